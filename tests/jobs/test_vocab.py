"""What a vocabulary is counted in, and what a call may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nuteprune
from nuteprune.errors import UserError
from nuteprune.jobs.job import VocabJob
from nuteprune.jobs.vocab_text import parts


def test_text_is_read_in_small_parts_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nuteprune.jobs.vocab_text.TOGETHER", 10)
    monkeypatch.setattr("nuteprune.jobs.vocab_text.MOST_CHARACTERS", 25)
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
