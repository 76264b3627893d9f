"""Tables and picture of the default on other text, from results/default.json.

`python benchmarks/default_table.py` writes the table of docs/quality.md and the picture anew,
`docs/all_tables.py` the other table. A run is in a table where it has a `row`, what the table calls
it; the others are trials that the log tells of. One table has the default beside other methods, the
other one what differs from the default in a setting.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from quality_tables import spread
from quality_text import times_dense

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "default.json"
PICTURE = RESULTS.with_name("other-text.png")
PAGE = ROOT / "docs" / "quality.md"
BESIDE, VARIANTS = "other text", "variants"
"""What the tables are called."""

Run = Mapping[str, Any]
Group = tuple[float, int, str]
"""Target, steps and row: what a line of the table is of; seeds are summed up."""

DOMAINS = ("arithmetic", "code", "fables", "medicine")
COLUMNS = ("target", "steps", "", "seeds", "other text", *DOMAINS, "in-domain", "copies")
FIRST = "the default"
"""The row that comes first of its target and steps; the names of its variants begin with it."""
STYLES = {
    FIRST: ("o", "tab:blue"),
    "LLM-Pruner's units": ("s", "tab:orange"),
    "`--method taylor`": ("^", "tab:green"),
    "`--method flap`": ("v", "tab:red"),
}
"""Row -> marker and colour; other rows are not drawn."""
METHODS = (
    FIRST,
    "the default, priced",
    "the default, `--gates neurons`, priced",
    "the default, `--data self`, priced",
    "LLM-Pruner's units",
    "`--method taylor`",
    "`--method flap`",
)
"""Rows of the first table, in their order."""
STEPS = (0, 80)
"""Steps of the runs that are drawn."""


def figures(run: Run, dense: Run) -> dict[str, float]:
    """Return a run's figures by column: perplexity ÷ dense of each text, and percent copied."""
    times = times_dense(run, dense)
    ends = {"other text": times["other_mean"], "in-domain": times["in_domain"]}
    return {**ends, **times["other"], "copies": run["copying"]}


def grouped(results: Mapping[str, Any]) -> dict[Group, list[dict[str, float]]]:
    """Return the figures of each line of the tables, by target, steps and method."""
    groups: dict[Group, list[dict[str, float]]] = {}
    for run in results["runs"]:
        if "row" in run:
            key = (run["target"], run["steps"], run["row"])
            groups.setdefault(key, []).append(figures(run, results["dense"]))
    return dict(sorted(groups.items(), key=_place))


def _place(item: tuple[Group, Any]) -> tuple[float, int, int]:
    (target, steps, row), _ = item
    return target, steps, METHODS.index(row) if row in METHODS else len(METHODS)


def line(group: Group, seeds: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the cells of a line; those of several seeds are their mean ± standard deviation."""
    target, steps, row = group
    name = f"**{row}**" if row == FIRST else row
    cells = [f"{target:.0%}".replace("%", " %"), str(steps or "none"), name, str(len(seeds))]
    for column in COLUMNS[len(cells) : -1]:
        cells.append(spread([x[column] for x in seeds]))
    copied = [x["copies"] for x in seeds]
    more = f" ± {statistics.stdev(copied):.0f}" if len(copied) > 1 else ""
    return [*cells, f"{statistics.fmean(copied):.0f}{more} %"]


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables as pages have them, by what they are called."""
    heads = [list(COLUMNS), ["---"] * len(COLUMNS)]
    found: dict[str, list[list[str]]] = {BESIDE: [*heads], VARIANTS: [*heads]}
    for group, seeds in grouped(results).items():
        found[BESIDE if group[2] in METHODS else VARIANTS].append(line(group, seeds))
    kept = [i for i, column in enumerate(COLUMNS) if column not in DOMAINS]
    found[VARIANTS] = [[cells[i] for i in kept] for cells in found[VARIANTS]]  # a narrow table
    return {
        name: "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("|  |", "| |")
        for name, lines in found.items()
    }


def place(name: str) -> re.Pattern[str]:
    """Return what finds a table in the page."""
    return re.compile(rf"(?<=<!-- table: {name} -->\n\n).*?(?=\n\n)", re.S)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw other text and copying by how much is removed."""
    figure, axes = plt.subplots(2, 1, figsize=(6.4, 8), layout="constrained")
    for name, axis, dense in zip(
        ("other text", "copies"), axes, (1, results["dense"]["copying"]), strict=True
    ):
        _panel(axis, grouped(results), name)
        axis.plot(0, dense, "k*", markersize=11, label="dense")
        axis.set_xlabel("decoder parameters removed (%)")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("perplexity ÷ dense, other text")
    axes[0].set_yscale("log")
    axes[0].set_yticks([1, 1.5, 2, 3, 4, 6, 10], minor=False)
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("")
    axes[1].set_ylabel("tokens right when a random sequence repeats (%)")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, groups: Mapping[Group, Sequence[Mapping[str, float]]], column: str) -> None:
    drawn: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for (target, steps, row), seeds in groups.items():
        if row in STYLES and steps in STEPS:
            dot = (100 * target, statistics.fmean(x[column] for x in seeds))
            drawn.setdefault((row, steps), []).append(dot)
    for (row, steps), dots in sorted(drawn.items(), key=lambda x: list(STYLES).index(x[0][0])):
        style = "-" if steps else "--"
        marker, colour = STYLES[row]
        label = f"{row.strip('`')}, {f'{steps} steps' if steps else 'untrained'}"
        fill = colour if steps else "none"
        axis.plot(*zip(*dots, strict=True), f"{marker}{style}", c=colour, mfc=fill, label=label)


def main() -> None:
    """Write the tables and the picture anew."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    table = tables(results)[BESIDE]
    PAGE.write_text(place(BESIDE).sub(lambda _: table, page, count=1), encoding="utf-8")
    draw(results, PICTURE)


if __name__ == "__main__":
    main()
