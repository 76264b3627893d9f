"""The table of quality against minutes: from its JSON, and its rows as files."""

from __future__ import annotations

import argparse
import json
import math

import pytest

from tests.scripts import script

frontier = script("frontier")
FOUND = json.loads(frontier.RESULTS.read_text(encoding="utf-8"))


def test_the_page_has_the_table_of_the_results() -> None:
    page = frontier.PAGE.read_text(encoding="utf-8")
    assert frontier.PLACE.findall(page) == [frontier.table(FOUND["rows"], FOUND["dense"])]


def test_runs_ended_in_their_minutes() -> None:
    for row in FOUND["rows"]:  # of a shared machine: two of 36 minutes took 39 and 40
        assert row["took"] / 60 == pytest.approx(row["minutes"], rel=0.12)


def test_other_text_is_a_geometric_mean_beside_the_dense_model() -> None:
    [row, *_] = FOUND["rows"]
    ratios = [math.log(row["other"][x] / FOUND["dense"]["other"][x]) for x in row["other"]]
    found = frontier.figures_of(row, FOUND["dense"])["other"]
    assert found == pytest.approx(math.exp(sum(ratios) / len(ratios)))


def test_rows_are_files_of_their_own() -> None:
    asked = argparse.Namespace(
        model="demo", minutes="5,10", targets="0.2,0.5", seeds="0,1", methods="surgeon,taylor"
    )
    asked.choose = False
    rows = frontier.rows_of(asked)
    assert len({frontier.row_name(x) for x in rows}) == len(rows) == 16
    assert frontier.row_name(rows[0]) == "surgeon_20_5-minutes_seed-0.json"
