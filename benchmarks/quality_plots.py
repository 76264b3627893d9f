"""Pareto plots of the quality table: perplexity against parameters and against seconds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

CEILING = 20
"""Points beyond so many times the dense perplexity are off the plot: broken, not pruned."""

STYLES = {"untrained": "o:", "refitted": "s--", "trained": "D-"}
"""Stage -> marker and line."""

LONGER = "P-"
"""The same of runs of more steps than the shortest."""

FIRST = ("nuteprune", "fisher")
"""Methods that get the first colours."""

FRONT = {"color": "0.85", "linewidth": 6, "zorder": 0}
"""How the Pareto front is drawn."""


@dataclass(frozen=True)
class Point:
    """Means over the seeds of one method, stage, target and number of steps."""

    method: str
    stage: str
    target: float
    steps: int
    params: float
    seconds: float
    mean: float
    other: float | None = None
    copying: float | None = None

    @property
    def label(self) -> str:
        """What runs of one line share."""
        return f"{self.method}, {f'{self.steps} steps' if self.steps else self.stage}"


def points_of(records: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the points of a table, those of one label together, by growing target."""
    groups: dict[tuple[str, str, float, int], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if "refused" in record:
            continue
        where = (record["target"], record["steps"])
        stage = "trained" if record["steps"] else "untrained"
        groups[record["label"], stage, *where].append(record)
        if "refitted" in record:
            again = {**record, **record["refitted"]}
            groups[record["label"], "refitted", *where].append(again)
    points = [Point(*key, *_means(rows)) for key, rows in groups.items()]
    return sorted(points, key=lambda p: (tuple(STYLES).index(p.stage), p.label, p.target))


def _means(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the means of a point; None for what its records do not have."""
    found = [statistics.fmean(row[x] for row in rows) for x in ("params", "seconds", "mean")]
    other = [row.get("times_dense", {}).get("other_mean") for row in rows]
    copied = [row.get("copying") for row in rows]
    known = [None if None in x else statistics.fmean(x) for x in (other, copied)]
    return [*found, *known]


def legend(dots: Sequence[Point]) -> str:
    """Return what the legend says of a line: other text and copying too, by growing target."""
    text = dots[0].label
    if all(p.other is not None for p in dots):
        text += f"\nother text × {', '.join(f'{p.other:.2f}' for p in dots)}"
    if all(p.copying is not None for p in dots):
        text += f"\ncopying {', '.join(f'{p.copying:.0f}' for p in dots)} %"
    return text


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both coordinates, by growing first coordinate."""
    best, kept = float("inf"), []
    for x, y in sorted(points):
        if y < best:
            best = y
            kept.append((x, y))
    return kept


def draw(
    records: Sequence[Mapping[str, Any]], dense: Mapping[str, Any], folder: Path
) -> list[Path]:
    """Draw both plots; returns their files."""
    points = points_of(records)
    names = sorted({p.method for p in points}, key=lambda name: (name not in FIRST, name))
    colors = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    shown = [p for p in points if p.mean < CEILING * dense["mean"]]
    short = min((p.steps for p in shown if p.steps), default=0)

    figure, axes = _canvas("parameters after pruning (millions)")
    # Models of one target differ in size by less than a step of the allocator: the best counts.
    targets = sorted({p.target for p in shown})
    best = [min((p for p in shown if p.target == t), key=lambda p: p.mean) for t in targets]
    axes.plot(*zip(*front([(p.params / 1e6, p.mean) for p in best]), strict=True), **FRONT)
    for label in dict.fromkeys(p.label for p in shown):
        dots = [p for p in shown if p.label == label]
        axes.plot(
            [p.params / 1e6 for p in dots],
            [p.mean for p in dots],
            _style(dots[0], short),
            color=colors[dots[0].method],
            label=legend(dots),
        )
    axes.plot(dense["params"] / 1e6, dense["mean"], "k*", markersize=12, label="dense")
    files = [_save(figure, folder / "perplexity-by-params.png")]

    figure, axes = _canvas("seconds from the dense model to the pruned one, judging excluded")
    for target in targets:
        line = front([(max(p.seconds, 0.1), p.mean) for p in shown if p.target == target])
        axes.plot(*zip(*line, strict=True), drawstyle="steps-post", **FRONT)
        axes.annotate(f"{target:.0%}", line[-1], (10, 0), textcoords="offset points", va="center")
    for label in dict.fromkeys(p.label for p in shown):
        dots = [p for p in shown if p.label == label]
        marker = _style(dots[0], short)[0]
        axes.scatter(
            [max(p.seconds, 0.1) for p in dots],
            [p.mean for p in dots],
            marker=marker,
            color=colors[dots[0].method],
            label=legend(dots),
        )
    axes.axhline(dense["mean"], color="k", linewidth=0.8, label="dense")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(LogFormatter())  # none where they would crowd
    return [*files, _save(figure, folder / "perplexity-by-seconds.png")]


def _style(point: Point, short: int) -> str:
    return LONGER if point.steps > short else STYLES[point.stage]


def _canvas(label: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    axes.set_xlabel(label)
    axes.set_ylabel("held-out perplexity, mean of the sources")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
