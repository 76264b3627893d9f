"""The plans of docs/cost.md are those of the results; test_default_table.py has docs/tables.md."""

from __future__ import annotations

import json
from pathlib import Path

from tests.scripts import script

tables = script("plan_tables")
ROOT = Path(__file__).parents[2]


def test_the_page_shows_what_was_planned() -> None:
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    plans = json.loads(tables.RESULTS.read_text(encoding="utf-8"))
    assert [plan["model"] for plan in plans] == [*tables.CONFIGS]
    assert tables.summary(plans) in page
