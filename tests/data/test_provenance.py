from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nuteprune.data.examples import read_examples
from nuteprune.data.fingerprint import (
    IN_DOMAIN,
    NOT_KNOWN,
    OTHER_TEXT,
    Fingerprint,
    kind_of,
    learned_from,
    text_entry,
)
from nuteprune.data.held_out import held_out_blocks
from nuteprune.data.training_text import training_blocks
from nuteprune.judge.published_blocks import rows_of


def known(*names: str) -> dict[str, Any]:
    return Fingerprint(names=names).to_dict()


def test_every_text_that_a_model_learned_from_counts() -> None:
    deeper = {"data": "d", "text": known("d"), "earlier": {"data": "e"}}
    record: dict[str, Any] = {
        "config": {"data": "a"},
        "text": known("a"),
        "history": [{"config": {"data": "b"}, "recover": {"data": "c", "text": known("c")}}],
        "recover": {"data": "f", "text": known("f"), "earlier": deeper},
    }
    found = [None if x is None else x.names for x in learned_from(record)]
    assert found == [None, {"c"}, {"a"}, {"f"}, {"d"}, None]
    assert learned_from({}) == learned_from({"config": {}}) == []


def documents(topic: str, count: int = 200) -> list[str]:
    return [f"Document {i} of {topic} has a few words. " * 3 for i in range(count)]


def write(path: Path, texts: list[str], **more: str) -> str:
    path.parent.mkdir(exist_ok=True)
    rows = (json.dumps({"text": text} | more) for text in texts)
    path.write_text("\n".join(rows) if path.suffix == ".jsonl" else "\n\n\n".join(texts))
    return str(path)


@pytest.mark.parametrize("whole", [False, True])
def test_a_text_is_known_by_what_it_says_wherever_it_is(
    whole: bool, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    news, poems = documents("news"), documents("poems")
    write(tmp_path / "here/news.txt", news)
    monkeypatch.chdir(tmp_path / "here")
    blocks = training_blocks("news.txt", tiny_tokenizer, length=16, count=4, seed=0)
    stated = json.loads(
        json.dumps({"config": {"data": "news.txt"}, "text": blocks.fingerprint.to_dict()})
    )
    monkeypatch.chdir(tmp_path)

    def kind(spec: str) -> str:
        (rows,) = rows_of(spec, whole=whole).values()
        list(rows.read())
        return kind_of(rows.fingerprint, learned_from(stated))

    assert kind("here/news.txt") == IN_DOMAIN
    assert kind(write(tmp_path / "news.txt", poems)) == OTHER_TEXT
    assert kind(write(tmp_path / "copy.txt", news)) == IN_DOMAIN
    assert kind(write(tmp_path / "other-form.jsonl", news, source="web")) == IN_DOMAIN
    assert kind(write(tmp_path / "half.txt", [*news[:30], *poems])) == IN_DOMAIN
    (tmp_path / "both").mkdir()
    write(tmp_path / "both/a.txt", poems)
    write(tmp_path / "both/b.txt", news)
    assert kind(str(tmp_path / "both")) == IN_DOMAIN


def test_a_book_is_known_when_it_was_edited(tmp_path: Path, tiny_tokenizer: Any) -> None:
    book = "\n\n".join(documents("a long book", 300))
    spec = write(tmp_path / "book.txt", [book])
    blocks = training_blocks(spec, tiny_tokenizer, length=16, count=4, seed=0)
    for text, expected in ((book[3000:], IN_DOMAIN), (book.replace("book", "tale"), OTHER_TEXT)):
        judged = Fingerprint()
        judged.add_document(text)
        assert kind_of(judged, [blocks.fingerprint]) == expected


def test_instructions_are_known_as_text_and_as_examples(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    def rows(topic: str) -> str:
        path = tmp_path / f"{topic}.jsonl"
        pairs = [{"instruction": f"{topic} {i}?", "output": f"It is {topic}."} for i in range(99)]
        path.write_text("\n".join(map(json.dumps, pairs)))
        return str(path)

    examples = read_examples(rows("salt"), tiny_tokenizer, length=400, most=40)
    assert kind_of(Fingerprint(examples.fingerprint.to_dict()), [examples.fingerprint]) == IN_DOMAIN
    for spec, expected in ((tmp_path / "salt.jsonl", IN_DOMAIN), (rows("bread"), OTHER_TEXT)):
        held_out = held_out_blocks(str(spec), tiny_tokenizer, length=8, count=2)
        entry = text_entry(examples, held_out)
        assert set(entry["judged"].values()) == {expected}


def test_only_what_would_be_known_is_called_other_text() -> None:
    def of(*texts: str) -> Fingerprint:
        found = Fingerprint()
        for text in texts:
            found.add_document(text)
        return found

    judged, many = of("a rare text"), of(*(f"text {i}" for i in range(40_000)))
    assert kind_of(judged, [of("another")]) == OTHER_TEXT
    assert kind_of(judged, [of("another"), None]) == NOT_KNOWN
    assert kind_of(judged, [of("a rare text"), None]) == IN_DOMAIN
    # Of so many, a sample tells nothing of a single one, and of hundreds it does.
    assert kind_of(judged, [many]) == NOT_KNOWN
    assert kind_of(of(*(f"text {i}" for i in range(500))), [many]) == IN_DOMAIN
    assert kind_of(of(*(f"other {i}" for i in range(500))), [many]) == OTHER_TEXT
    # Some documents are alike everywhere.
    talk = of("Thanks!", *(f"talk {i}" for i in range(500)))
    assert kind_of(talk, [of("Thanks!", "text")]) == NOT_KNOWN
    assert kind_of(of(), [of("another")]) == NOT_KNOWN


@pytest.mark.parametrize(
    ("names", "learned", "kind"),
    [
        (["demo:recipes"], ["demo:speeches", "demo:recipes"], IN_DOMAIN),
        (["wikitext2", "salesforce/wikitext"], ["salesforce/wikitext"], IN_DOMAIN),
    ],
)
def test_names_that_are_the_same_everywhere_tell(
    names: list[str], learned: list[str], kind: str
) -> None:
    assert kind_of(Fingerprint(names=names), [Fingerprint(names=learned)]) == kind


def test_whoever_reads_text_notes_documents_files_and_public_names(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    of = {"length": 8, "count": 1, "seed": 0}
    text, rows = write(tmp_path / "a.txt", documents("a")), tmp_path / "rows.jsonl"
    pairs = [{"instruction": f"Salt {i}?", "output": "It is salt."} for i in range(99)]
    rows.write_text("\n".join(map(json.dumps, pairs)))
    copy = write(tmp_path / "copy.jsonl", documents("b"))
    (published,) = rows_of(f"wikitext2={copy}").values()
    list(published.read())
    found = {
        "text": training_blocks(text, tiny_tokenizer, **of).fingerprint,
        "examples": read_examples(str(rows), tiny_tokenizer, length=400).fingerprint,
        "demo": training_blocks("demo:recipes", tiny_tokenizer, **of).fingerprint,
        "published": published.fingerprint,
    }
    noted = {name: (bool(x.documents), len(x.files), x.names) for name, x in found.items()}
    assert noted == {
        "text": (True, 1, set()),
        "examples": (True, 1, set()),
        "demo": (True, 0, {"demo:recipes"}),
        "published": (True, 1, {"wikitext2", "salesforce/wikitext"}),
    }
