"""Draws the figures of docs/how-it-works.md: python docs/figures/draw.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nuteprune.judge.plots import COLOURS, dots, finish, legend, new_figure, percent, steps_axis
from nuteprune.progressive.teachers import Schedule

HERE = Path(__file__).parent
FONT = "font-family='system-ui, sans-serif' font-size='13'"


def page(width: int, height: int, body: str) -> str:
    """Return an SVG file with a ground of its own, readable on light and dark pages."""
    arrow = (
        "<marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
        f"orient='auto'><path d='M0 0 L8 4 L0 8 z' fill='{COLOURS['muted']}'/></marker>"
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}'>"
        f"<defs>{arrow}</defs><rect width='100%' height='100%' rx='6' fill='{COLOURS['paper']}'/>"
        f"<g {FONT} fill='{COLOURS['ink']}'>{body}</g></svg>\n"
    )


def box(x: int, y: int, width: int, height: int, lines: str, colour: str = "ink") -> str:
    """Return a frame with lines of text in its middle, separated by |."""
    parts = lines.split("|")
    top = y + height / 2 + 5 - 9 * (len(parts) - 1)
    said = "".join(
        f"<text x='{x + width / 2}' y='{top + 18 * i}' text-anchor='middle'>{part}</text>"
        for i, part in enumerate(parts)
    )
    return (
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='4' fill='none' "
        f"stroke='{COLOURS[colour]}' stroke-width='1.4'/>{said}"
    )


def arrow(*points: tuple[int, int]) -> str:
    """Return a line through points with a tip at its end."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return (
        f"<polyline points='{path}' fill='none' stroke='{COLOURS['muted']}' stroke-width='1.4' "
        "marker-end='url(#tip)'/>"
    )


def note(x: int, y: int, text: str, colour: str = "muted", anchor: str = "start") -> str:
    """Return a line of small text."""
    fill = COLOURS[colour]
    return (
        f"<text x='{x}' y='{y}' fill='{fill}' font-size='12' text-anchor='{anchor}'>{text}</text>"
    )


def gates() -> str:
    """Return one decoder layer, with the places where masks multiply."""
    body = note(20, 28, "One decoder layer. × is where a mask multiplies what passes.", "ink")
    for y, kind, first, last, unit in (
        (60, "attn_block", "Q, K, V projections|and attention", "output projection", "heads"),
        (150, "mlp_block", "gate and up|projections", "down projection", "neurons"),
    ):
        body += arrow((24, y + 27), (62, y + 27)) + box(64, y, 168, 54, first)
        body += arrow((232, y + 27), (284, y + 27))
        body += box(286, y + 9, 92, 36, f"× {unit}", "orange") + arrow((378, y + 27), (418, y + 27))
        body += box(420, y, 138, 54, last) + arrow((558, y + 27), (596, y + 27))
        body += box(598, y + 9, 104, 36, f"× {kind}", "orange")
    body += note(286, 143, "kv_groups: a KV head with its query heads", "muted")
    body += note(
        24, 236, "× hidden, on the embedding and on all that is written to the residual stream; "
    )
    body += note(24, 254, "LoRA sits on all seven projections. Everything else is frozen.")
    return page(720, 272, body)


def roles() -> str:
    """Return how one copy of the weights is teacher and student in a step."""
    body = box(252, 92, 196, 60, "one dense model,|frozen, in memory once")
    body += box(24, 24, 168, 54, "masks and LoRA|of this step", "blue")
    body += box(24, 166, 168, 54, "an earlier snapshot,|or none: dense", "green")
    body += arrow((192, 51), (300, 51), (300, 90)) + arrow((192, 193), (300, 193), (300, 154))
    body += arrow((448, 108), (508, 70)) + arrow((448, 136), (508, 174))
    body += box(510, 38, 186, 54, "student: hidden states,|next-token distribution", "blue")
    body += box(510, 152, 186, 54, "teacher: the same,|no gradients", "green")
    body += arrow((603, 150), (603, 94)) + note(612, 127, "loss")
    body += arrow((603, 36), (603, 12), (108, 12), (108, 22))
    body += note(330, 28, "gradients: LoRA, and scores of the gates", anchor="middle")
    body += arrow((80, 80), (80, 164)) + note(88, 118, "a snapshot at every")
    body += note(88, 134, "point of sparsity")
    return page(720, 240, body)


def teachers(target: float = 0.2, steps: int = 80) -> str:
    """Return sparsity of student and teacher over a run, by the schedule of the code."""
    schedule = Schedule(target, steps)
    snapshots = [0.0]  # the dense model's, at index -1 of the schedule's
    student, teacher = np.zeros(steps), np.zeros(steps)
    for step in range(steps):
        student[step] = schedule.sparsity(step)
        teacher[step] = snapshots[schedule.teacher(step, len(snapshots) - 1) + 1]
        if not schedule.rests(step) and schedule.due(student[step], snapshots[-1]):
            snapshots.append(student[step])
    at = np.arange(1.0, steps + 1)
    with new_figure("Sparsity by step", 235) as (figure, axes):
        axes.plot(at, student, color=COLOURS["blue"], lw=2.4, label="student", **dots(at))
        axes.plot(at, student, ":", color=COLOURS["ink"], lw=1.2, label="target")
        axes.step(at, teacher, where="mid", color=COLOURS["orange"], label="its teacher")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda y, _: percent(y, 0))
        steps_axis(axes)
        legend(axes)
    svg = finish("sparsity", "", figure).svg
    colours = "".join(f"--{name}:{value};" for name, value in COLOURS.items())
    ground = "<rect x='-1%' y='-1%' width='102%' height='102%' fill='var(--paper)'/>"
    head, close, rest = svg.partition(">")
    style = f"<style>svg{{{colours}}}text{{font-family:system-ui,sans-serif}}</style>"
    return f"{head} width='420' xmlns='http://www.w3.org/2000/svg'{close}{style}{ground}{rest}"


if __name__ == "__main__":
    for name, drawing in (("gates", gates()), ("roles", roles()), ("teachers", teachers())):
        (HERE / f"{name}.svg").write_text(drawing, encoding="utf-8")
