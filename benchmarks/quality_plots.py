"""Pareto plots of the quality table: perplexity against parameters and against seconds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CEILING = 20
"""Points beyond so many times the dense perplexity are off the plot: broken, not pruned."""

STYLES = {"untrained": (":", "o"), "re-fitted": ("--", "s"), "trained": ("-", "D")}
"""Stage -> line and marker."""


def points_of(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return (method, stage) -> points, means over seeds, by growing number of parameters."""
    groups: dict[tuple[str, str, float, int], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if "refused" in record:
            continue
        key = (record["label"], record["target"], record["steps"])
        groups[key[0], "trained" if record["steps"] else "untrained", *key[1:]].append(record)
        if "refitted" in record:
            groups[key[0], "re-fitted", *key[1:]].append({**record, **record["refitted"]})
    series = defaultdict(list)
    for (label, stage, _, steps), rows in groups.items():
        name = label if stage != "trained" else f"{label}, {steps} steps"
        point = {k: statistics.fmean(row[k] for row in rows) for k in ("params", "mean", "seconds")}
        series[name, stage].append(point)
    return {key: sorted(rows, key=lambda p: p["params"]) for key, rows in series.items()}


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
    series = points_of(records)
    methods = list(dict.fromkeys(name.split(",")[0] for name, _ in series))
    colors = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(methods)}
    files = []
    for field, label, scale in (
        ("params", "parameters after pruning (millions)", 1e-6),
        ("seconds", "seconds from intact model to pruned one, judging excluded", 1.0),
    ):
        figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
        shown = []
        for (name, stage), points in series.items():
            line, marker = STYLES[stage]
            inside = [
                (max(p[field] * scale, 1e-1), p["mean"])
                for p in points
                if p["mean"] < CEILING * dense["mean"]
            ]
            if inside:
                axes.plot(
                    *zip(*inside, strict=True),
                    line if field == "params" else "",
                    marker=marker,
                    color=colors[name.split(",")[0]],
                    label=name if stage == "trained" else f"{name}, {stage}",
                )
                shown += inside
        if field == "params":
            axes.plot(dense["params"] * scale, dense["mean"], "k*", markersize=12, label="dense")
            axes.set_xlim(right=dense["params"] * scale * 1.02)
            axes.plot(*zip(*front(shown), strict=True), color="0.8", linewidth=6, zorder=0)
        else:
            axes.axhline(dense["mean"], color="k", linewidth=0.8, label="dense")
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel(label)
        axes.set_ylabel("held-out perplexity, mean of the sources")
        axes.grid(alpha=0.3, which="both")
        figure.legend(loc="outside right upper", fontsize=8)
        files.append(folder / f"perplexity-by-{field}.png")
        figure.savefig(files[-1], dpi=130)
        plt.close(figure)
    return files
