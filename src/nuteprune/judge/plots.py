"""The plots of a report: drawn once, written as SVG that follows the page and as PNG.

Colours are those of the light page. In SVG each becomes the CSS variable of its name, so that the
page decides; it also gives text its font. User's words in plots go through `plain`.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

COLOURS: Final[Mapping[str, str]] = {
    "ink": "#1d2125",
    "muted": "#5c646d",
    "rule": "#d5d3cc",
    "blue": "#1f5c99",
    "orange": "#b4540a",
    "green": "#2f7350",
    "violet": "#7b4a94",
    "paper": "#fdfcf9",
}
"""Name of a CSS variable -> its colour on the light page."""

# Sizes are points, and CSS pixels on a page where a plot is 340 wide: a phone.
_WIDTH = 340
_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nuteprune",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": COLOURS["ink"],
    "text.parse_math": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.width": 0.7,
    "xtick.minor.width": 0.5,
    "ytick.left": False,
    "ytick.minor.left": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": COLOURS["paper"],
    "figure.constrained_layout.use": True,
    "savefig.dpi": 220,
}

LOSS_PARTS: Final[Mapping[str, tuple[str, str]]] = {
    "token_kl": ("tokens (KL)", "blue"),
    "layer": ("layers", "orange"),
    "lm": ("language model", "green"),
    "penalty": ("sparsity term", "violet"),
}
"""Key in metrics.jsonl -> (label, colour)."""

POINTS: Final = 500
"""Steps that a line has room for; of more, neighbours are averaged."""


@dataclass(frozen=True)
class Plot:
    """A drawing in both of its forms.

    Args:
        name: file name without suffix.
        title: what it shows.
        alt: what can be read from it, for those who do not see it.
        svg: an `<svg>` element to stand in a page.
        png: the same as a picture on the light page's ground.
    """

    name: str
    title: str
    alt: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Row:
    """A row of the heat map: what each layer kept of one kind, and had before."""

    name: str
    kept: Sequence[int]
    before: Sequence[int]


def plain(text: str, limit: int = 24) -> str:
    """Return text that any font can try to draw on one line: no control characters, not long."""
    shown = "".join("\ufffd" if unicodedata.category(c) in "CcCfCsCoCn" else c for c in text)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def percent(share: float, digits: int = 0) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.{digits}f}\u202f%"


def sparsity_plot(metrics: Sequence[Mapping[str, Any]], teachers: Sequence[float]) -> Plot:
    """Draw the sparsity of student and teacher, and the target, over the steps.

    Args:
        metrics: lines of metrics.jsonl.
        teachers: sparsity of each teacher by index; the intact model (-1) has 0.
    """
    step = _column(metrics, "step")
    student, target = _column(metrics, "sparsity"), _column(metrics, "target")
    index = _column(metrics, "teacher")
    known = np.array([*teachers, 0.0])  # the last is found at index -1
    usable = np.isfinite(index) & (index < len(teachers))
    teacher = np.where(usable, known[np.where(usable, index, -1).astype(int)], np.nan)
    title = "Sparsity by step"
    with _figure(title, 235) as (figure, axes):
        axes.plot(*_thinned(step, student), color=COLOURS["blue"], label="student", **_dots(step))
        axes.plot(*_thinned(step, target), ":", color=COLOURS["ink"], lw=1.3, label="target")
        axes.step(
            *_thinned(step, teacher),
            where="mid",
            color=COLOURS["orange"],
            label="its teacher",
            **_dots(step),
        )
        axes.set_ylim(bottom=0)
        digits = 0 if axes.get_ylim()[1] > 0.04 else 1
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: percent(y, digits)))
        _steps_axis(axes)
        _legend(figure, axes)
    alt = (
        f"Line chart over {step[-1]:.0f} steps. The student's sparsity goes from "
        f"{percent(student[0], 1)} to {percent(student[-1], 1)} (target {percent(target[-1], 1)}); "
        f"its teacher's is {percent(np.nanmax(teacher, initial=0), 1)} at most and "
        f"{percent(teacher[-1], 1)} at the end."
    )
    return _plot("sparsity", title, alt, figure)


def loss_plot(metrics: Sequence[Mapping[str, Any]]) -> Plot:
    """Draw the parts of the loss over the steps."""
    step = _column(metrics, "step")
    parts = {key: _column(metrics, key) for key in LOSS_PARTS if any(key in m for m in metrics)}
    title = "Loss by step"
    with _figure(title, 235) as (figure, axes):
        total = _column(metrics, "loss")
        drawn = [total, *parts.values()]
        if len(parts) > 1:
            axes.plot(*_thinned(step, total), color=COLOURS["ink"], lw=1, label="all", alpha=0.75)
        for key, values in parts.items():
            label, colour = LOSS_PARTS[key]
            x, y = _thinned(step, values)
            axes.plot(x, y, color=COLOURS[colour], label=label, **_dots(step))
        finite = np.concatenate([x[np.isfinite(x)] for x in drawn])
        if len(finite) and finite.max() > 0:
            if finite.min() > 0:
                axes.set_yscale("log")
            else:
                axes.set_yscale("symlog", linthresh=max(1e-4, float(finite.max()) / 100))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _steps_axis(axes)
        _legend(figure, axes)
    ends = "; ".join(
        f"{LOSS_PARTS[key][0]} from {values[0]:.3g} to {values[-1]:.3g}"
        for key, values in parts.items()
    )
    return _plot("loss", title, f"Line chart over {step[-1]:.0f} steps: {ends}.", figure)


def layers_plot(rows: Sequence[Row]) -> Plot:
    """Draw a heat map: layers from first to last, and the share that each kept of each kind."""
    count = len(rows[0].kept)
    title = "Kept in each layer"
    with _figure(title, 62 + 40 * len(rows)) as (figure, axes):
        for i, row in enumerate(rows):
            for layer, (kept, before) in enumerate(zip(row.kept, row.before, strict=True)):
                _cell(axes, layer, i, kept / before if before else 0.0)
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [row.name for row in rows], color=COLOURS["ink"])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.set_xlabel("layer")
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        _scale(figure)
    alt = "Heat map. " + " ".join(_row_in_words(row) for row in rows)
    return _plot("layers", title, alt, figure)


def gates_plot(kind: str, scores: ArrayLike, kept: ArrayLike | None, probability: bool) -> Plot:
    """Draw how the scores of one kind of gate are distributed, and where the cut came to lie.

    Args:
        kind: kind of gate.
        scores: (N,), one per unit.
        kept: (N,), whether a unit stays; None if that is not decided.
        probability: whether scores are probabilities of being kept.
    """
    score_N = np.asarray(scores, dtype=float)
    kept_N = np.ones(len(score_N), bool) if kept is None else np.asarray(kept, bool)
    fine = np.isfinite(score_N) & (probability | (score_N > 0))
    score_N, kept_N = score_N[fine], kept_N[fine]
    words = kind.replace("kv_groups", "KV groups").replace("_", " ")
    title = f"Scores of {words}"
    with _figure(title, 200) as (figure, axes):
        bins = max(8, min(48, int(np.sqrt(max(1, len(score_N))) * 2)))
        edges: Any = np.linspace(0, 1, bins + 1)
        if not probability:
            low, high = (score_N.min(), score_N.max()) if len(score_N) else (0.1, 1.0)
            edges = np.geomspace(low, high if high > low else low * 2, bins + 1)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _power(x)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        groups = [(kept_N, "blue", "kept" if kept is not None else "units")]
        if kept is not None:
            groups.insert(0, (~kept_N, "orange", "removed"))
        axes.hist(
            [score_N[group] for group, *_ in groups],
            edges,
            stacked=True,
            color=[COLOURS[colour] for _, colour, _ in groups],
            label=[label for *_, label in groups],
            edgecolor=COLOURS["paper"],
            linewidth=0.4,
        )
        axes.set_xlabel("probability of staying" if probability else "score (loss if removed)")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        _legend(figure, axes)
    alt = f"Histogram of the scores of {len(score_N):,} {words}"
    alt += "." if kept is None else f": {int(kept_N.sum()):,} kept, {int((~kept_N).sum()):,} not."
    return _plot(f"gates_{kind}", title, alt, figure)


def perplexity_plot(before: Mapping[str, float], after: Mapping[str, float]) -> Plot:
    """Draw the perplexity on each source, dense and pruned; sources without both are left out."""
    names = [x for x in before if np.isfinite([before[x], after.get(x, np.nan)]).all()]
    title = "Perplexity on held-out text"
    with _figure(title, 76 + 34 * max(1, len(names))) as (figure, axes):
        rows = np.arange(len(names))
        old, new = ([float(values[x]) for x in names] for values in (before, after))
        axes.hlines(rows, old, new, color=COLOURS["rule"], lw=3)
        for values, colour, label in ((old, "muted", "dense"), (new, "blue", "pruned")):
            axes.plot(values, rows, "o", color=COLOURS[colour], ms=6.5, label=label)
        for y, a, b in zip(rows, old, new, strict=True):
            for value, other, colour in ((a, b, "muted"), (b, a, "blue")):
                right = value > other or (value == other and colour == "blue")
                axes.annotate(
                    f"{value:.1f}",
                    (value, y),
                    (7 if right else -7, 0),
                    textcoords="offset points",
                    ha="left" if right else "right",
                    va="center",
                    color=COLOURS[colour],
                )
        axes.set_yticks(rows, [plain(x) for x in names], color=COLOURS["ink"])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        top = max([*old, *new], default=1.0)
        if top > 30 * min([*old, *new], default=1.0):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.margins(x=0.2)
        else:
            axes.set_xlim(0, top * 1.15)
        _legend(figure, axes)
    pairs = "; ".join(f"{plain(x)}: {before[x]:.2f} dense, {after[x]:.2f} pruned" for x in names)
    return _plot("perplexity", title, f"Dot chart of perplexity. {pairs}.", figure)


# -- parts of drawings


def _column(metrics: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    return np.array([float(line.get(key, "nan")) for line in metrics])


def _thinned(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a line's points, averaged over neighbours where there are too many."""
    size = -(-len(x) // POINTS)
    if size == 1:
        return x, y
    parts = range(0, len(x), size)
    return (
        np.array([x[i : i + size].mean() for i in parts]),
        np.array([y[i : i + size].mean() for i in parts]),
    )


def _dots(step: NDArray[np.float64]) -> dict[str, Any]:
    """Return how to mark the points of a line so short that it may hardly be seen."""
    return {"marker": "o", "ms": 3.5} if len(step) < 4 else {}


def _power(x: float) -> str:
    """Return a power of ten as text, which takes the page's font."""
    return "10" + f"{round(np.log10(x))}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _cell(axes: Axes, x: float, y: float, share: float) -> None:
    box = (x - 0.46, y - 0.4), 0.92, 0.8
    axes.add_patch(Rectangle(*box, fc="none", ec=COLOURS["rule"], lw=0.6))
    if share:
        axes.add_patch(Rectangle(*box, fc=COLOURS["blue"], alpha=0.05 + 0.95 * share**1.5, lw=0))
    else:
        axes.plot(x, y, "x", color=COLOURS["muted"], ms=4)


def _scale(figure: Figure) -> None:
    """Draw the heat map's scale at the upper right."""
    axes = figure.add_axes((0.62, 0.9, 0.36, 0.07))
    axes.set_axis_off()
    axes.set(xlim=(-3, 8.5), ylim=(-0.5, 0.5))
    for i in range(5):
        _cell(axes, i, 0, 0.1 + i / 4 * 0.9)
    for x, text, side in ((-0.8, "few", "right"), (4.8, "all", "left")):
        axes.text(x, 0, text, ha=side, va="center", color=COLOURS["muted"])


def _row_in_words(row: Row) -> str:
    shares = [k / b if b else 0.0 for k, b in zip(row.kept, row.before, strict=True)]
    least = int(np.argmin(shares))
    return (
        f"{row.name}: {sum(row.kept):,} of {sum(row.before):,} kept, least in layer {least} "
        f"({row.kept[least]:,} of {row.before[least]:,})."
    )


def _steps_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _legend(figure: Figure, axes: Axes) -> None:
    """Put the legend in one row between title and plot."""
    handles, labels = axes.get_legend_handles_labels()
    axes.set_title(axes.get_title(loc="left"), pad=24)
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(labels),
        borderpad=0.2,
        borderaxespad=0.2,
        handlelength=1.3,
        handletextpad=0.5,
        columnspacing=1.2,
    )


# -- from drawings to files


@contextmanager
def _figure(title: str, height: int) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, height / 72))
        axes = figure.add_subplot()
        axes.set_title(title)
        yield figure, axes


def _plot(name: str, title: str, alt: str, figure: Figure) -> Plot:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # The page's fonts may have what the plot's own lacks, and the PNG shows a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        picture, drawing = io.BytesIO(), io.StringIO()
        figure.savefig(picture, format="png", metadata={"Software": None})
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawing, format="svg", transparent=True, metadata=metadata)
    return Plot(name, title, alt, _for_page(drawing.getvalue(), name), picture.getvalue())


def _for_page(svg: str, name: str) -> str:
    """Return a drawing as an element that takes colours and fonts from the page around it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<svg\b.*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    # Ids are unique within a drawing only, and a page holds several.
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"<style.*?</style>|<defs>\s*</defs>", "", svg, flags=re.S)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.strip()
