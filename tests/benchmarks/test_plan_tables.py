"""The tables of docs/cost.md are those of the results that the page names."""

from __future__ import annotations

import json
from pathlib import Path

from tests.scripts import script

tables = script("plan_tables")
ROOT = Path(__file__).parents[2]


def test_the_page_shows_what_was_planned() -> None:
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results" / "plan-large.json"
    plans = json.loads(results.read_text(encoding="utf-8"))
    assert [plan["model"] for plan in plans] == [*tables.CONFIGS]
    for plan in plans:
        assert tables.table(plan) in page
