from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nuteprune.judge.provenance import IN_DOMAIN, OTHER_TEXT, calibrated_on, kind_of


def test_every_text_that_a_model_learned_from_counts() -> None:
    record: dict[str, Any] = {
        "config": {"data": "demo"},
        "history": [{"config": {"data": ["a.txt", "self"]}, "recover": {"data": "b.txt"}}],
        "recover": {"data": "c.txt", "earlier": {"data": "d.txt", "earlier": {"data": "demo"}}},
    }
    assert calibrated_on(record) == ["a.txt", "self", "b.txt", "demo", "c.txt", "d.txt"]
    assert calibrated_on({}) == []


@pytest.mark.parametrize(
    ("spec", "calibrated", "same"),
    [
        ("demo", "demo", True),
        ("demo", "self", False),
        ("demo:recipes", "demo", True),
        ("demo", "demo:recipes,speeches", True),
        ("demo:recipes", "demo:speeches,recipes", True),
        ("demo:wikipedia", "demo:speeches,recipes", False),
        ("folder/news.jsonl", "folder/news.jsonl", True),
        ("folder/news.jsonl", "folder", True),
        ("folder", "folder/news.jsonl", True),
        ("folder/news.jsonl", "folder/poems.jsonl", False),
        ("folder/news.jsonl", "other", False),
        ("folder/news.jsonl", "elsewhere/news.jsonl", True),  # not here: the name has to do
        ("folder/news.jsonl", "other/news.jsonl", False),  # here, and another file
        ("folder/news.jsonl", "demo", False),
        ("owner/text:en:test", "Owner/text", True),
        ("owner/text", "owner/other", False),
        ("wikitext2", "Salesforce/wikitext:wikitext-2-raw-v1", True),
        ("wikitext2", "wikitext2", True),
        ("wikitext2", "demo", False),
        ("wikitext2=folder/news.jsonl", "folder", True),
        ("wikitext2=folder/news.jsonl", "other", False),
    ],
)
def test_a_text_is_in_domain_if_its_source_was_calibrated_on(
    spec: str, calibrated: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("folder/news.jsonl", "folder/poems.jsonl", "other/news.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    expected = IN_DOMAIN if same else OTHER_TEXT
    assert kind_of(spec, ["unrelated", calibrated]) == expected
    absolute = str(tmp_path / calibrated) if (tmp_path / calibrated).exists() else calibrated
    assert kind_of(spec, [absolute]) == expected
    assert kind_of(spec, []) == OTHER_TEXT
