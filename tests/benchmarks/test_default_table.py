"""The figures of README and docs/quality.md are those of the committed results."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import script

default_table = script("default_table")
RESULTS: dict[str, Any] = json.loads(default_table.RESULTS.read_text(encoding="utf-8"))
ROOT = Path(__file__).parents[2]


def test_the_page_has_the_tables_of_the_results() -> None:
    page = default_table.PAGE.read_text(encoding="utf-8")
    for name, table in default_table.tables(RESULTS).items():
        assert default_table.place(name).findall(page) == [table]


@pytest.mark.parametrize(
    ("beginning", "column", "digits"),
    [
        ("perplexity, other text", "other text", 2),
        ("copying from context", "copies", 0),
        ("perplexity, held-out text", "in-domain", 2),
    ],
)
def test_readme_has_the_figures_of_the_results(beginning: str, column: str, digits: int) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^\| {beginning}.*\|$", readme, re.M)
    shown = [float(re.findall(r"[\d.]+", cell)[0]) for cell in line.split("|")[3:-1]]
    groups = default_table.grouped(RESULTS)
    runs = [groups[target, 80, default_table.FIRST] for target in (0.2, 0.5)]
    means = [statistics.fmean(x[column] for x in seeds) for seeds in runs]
    assert shown == [float(f"{x:.{digits}f}") for x in means]


BESIDE = {
    r"\*\*the default\*\*": "the default",
    "LLM-Pruner's": "LLM-Pruner's units",
    "`--method taylor`": "`--method taylor`",
    "`--method flap`": "`--method flap`",
}


def test_readme_has_other_methods_beside_the_default() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    groups, found = default_table.grouped(RESULTS), 0
    for name, row in BESIDE.items():
        lines = re.findall(rf"^\| (\d+) % \| {name} \| (\d) \| (.*) \|$", readme, re.M)
        assert lines, name
        for target, seeds, figures in lines:
            of_it = groups[int(target) / 100, 80, row]
            ends = [
                f"{statistics.fmean(x[column] for x in of_it):.{digits}f} {sign}"
                for column, digits, sign in (
                    ("other text", 2, "×"),
                    ("in-domain", 2, "×"),
                    ("copies", 0, "%"),
                )
            ]
            assert (len(of_it), ends) == (int(seeds), figures.split(" | "))
            found += 1
    assert found == 2 * len(BESIDE)


def test_seeds_are_summed_up_and_trials_left_out() -> None:
    dense = {"other": dict.fromkeys(default_table.DOMAINS, 10.0), "mean": 5.0}
    method, variant = "`--method flap`", "the default, clipped to 1"
    run = {"target": 0.2, "steps": 80, "row": method, "mean": 6.0, "copying": 50.0}
    runs = [
        run | {"other": dict.fromkeys(default_table.DOMAINS, 15.0)},
        run | {"other": dict.fromkeys(default_table.DOMAINS, 17.0), "copying": 54.0},
        run | {"other": dict.fromkeys(default_table.DOMAINS, 90.0), "row": "the default"},
    ]
    runs += [{k: v for k, v in runs[0].items() if k != "row"}, runs[0] | {"row": variant}]
    tables = default_table.tables({"dense": dense | {"copying": 60.0}, "runs": runs})
    lines, others = (table.splitlines() for table in tables.values())
    assert [x.split(" | ")[2:5] for x in lines[2:]] == [
        ["**the default**", "1", "9.00"],
        [method, "2", "1.60 ± 0.14"],
    ]
    assert lines[3].endswith("| 1.20 ± 0.00 | 52 ± 3 % |")
    assert [x.split(" | ")[2:5] for x in others[2:]] == [[variant, "1", "1.50"]]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    default_table.draw(RESULTS, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
