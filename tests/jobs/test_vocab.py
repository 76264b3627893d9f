"""What a vocabulary is counted in, and what a call may not say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import nuteprune
from nuteprune.errors import UserError
from nuteprune.jobs.fewer_tokens import Cutter, Smaller, VocabText, parts
from nuteprune.jobs.job import VocabJob


def test_text_is_read_in_small_parts_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.TOGETHER", 10)
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.MOST_CHARACTERS", 25)
    documents = iter(["letter"] * 100)
    assert list(parts(documents)) == [["letter"] * 2, ["letter"] * 2, ["l"]]
    assert len(list(documents)) == 95
    assert list(parts(["few", "words"])) == [["few", "words"]]
    assert list(parts([])) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        *(({name: "any"}, f"setting {name} has no use in vocab") for name in VocabJob.NOT_HERE),
        ({"length": 1}, "length is 1; it must be at least 2"),
    ],
)
def test_settings_of_no_use_are_refused(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=told):
        nuteprune.vocab(str(tmp_path), out=out, keep=300, quiet=True, **given)
    assert not out.exists()


def test_what_a_smaller_vocabulary_costs_is_told_by_the_users_text() -> None:
    """A model of many languages writes in all of them, so its own text would keep them all."""
    cutter = Cutter(*(None,) * 6)  # type: ignore[arg-type]
    small: Any = Smaller([], None, None, {"data": 2.02, "own": 3.0})  # type: ignore[arg-type]
    cutter.__dict__["bits"] = {"data": 2.0, "own": 2.0}
    assert cutter.cost(small) == pytest.approx(0.01)
    cutter.__dict__["bits"] = {"own": 2.0}
    assert cutter.cost(small) == pytest.approx(0.5)
    cutter.__dict__["bits"] = {}
    assert cutter.cost(small) == math.inf


def test_text_to_judge_by_is_short_and_in_pieces() -> None:
    text = VocabText([], 8)
    text.hold_out("data", ["", "a" * 600, "b" * 600, "c"], 900)
    assert [len(x) for x in text.held_out["data"]] == [250, 250, 100, 250, 50]
    text.hold_out("own", [""], 900)
    assert set(text.held_out) == {"data"}
