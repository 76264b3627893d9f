"""The figures of docs/quality.md are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.scripts import script

default_table = script("default_table")
RESULTS: dict[str, Any] = json.loads(default_table.RESULTS.read_text(encoding="utf-8"))
ROOT = Path(__file__).parents[2]


def test_the_pages_have_the_tables_of_the_results() -> None:
    page = default_table.PAGE.read_text(encoding="utf-8")
    table = default_table.tables(RESULTS)[default_table.BESIDE]
    assert default_table.place(default_table.BESIDE).findall(page) == [table]
    tables = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    assert tables == script("all_tables", "docs").tables_page(), "python docs/all_tables.py"


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
