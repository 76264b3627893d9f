from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from nuteprune.data import readers
from nuteprune.data.held_out import HELD_OUT_SHARE, held_out_blocks, held_out_part, split
from nuteprune.data.readers import split_long
from nuteprune.data.specs import iter_documents
from nuteprune.errors import UserError


def book(number: int, words: int = 9000) -> str:
    """A long document in which no two places are alike."""
    return " ".join(f"w{number}-{i}" for i in range(words))


def parts(document: str) -> tuple[str, str]:
    trained, held_out = split(document)
    return "".join(trained), "".join(held_out)


# Of many letters, so that hypothesis finds documents on both sides of the threshold.
SHORT = st.integers(0, 10**6).map(lambda i: f"document {i}\n\nof few words")
LONG = st.integers(0, 10**6).map(lambda i: book(i, words=3000))


def text_file(folder: Path, documents: list[str]) -> None:
    (folder / "a.txt").write_text("\n" + "\n\n\n\n".join(documents) + "\n", encoding="utf-8")


def json_lines(folder: Path, documents: list[str]) -> None:
    rows = (json.dumps({"text": document + "\n"}) + "\n" for document in documents)
    (folder / "a.jsonl").write_text("".join(rows), encoding="utf-8")


def parquet_table(folder: Path, documents: list[str]) -> None:
    parquet.write_table(pa.table({"content": documents}), folder / "a.parquet")


def a_file_each(folder: Path, documents: list[str]) -> None:
    for i, document in enumerate(documents):
        (folder / f"{i}.txt").write_text(document, encoding="utf-8")


SPECS = [text_file, json_lines, parquet_table, a_file_each]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(SHORT | LONG, min_size=1, max_size=6, unique=True),
    others=st.lists(SHORT, max_size=300),
    specs=st.tuples(st.sampled_from(SPECS), st.sampled_from(SPECS)),
    chunk=st.sampled_from([97, 2**20]),
)
def test_no_character_of_held_out_text_is_trained_on_by_any_spec_that_holds_it(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    documents: list[str],
    others: list[str],
    specs: tuple[Callable[..., None], Callable[..., None]],
    chunk: int,
) -> None:
    """Words of long documents are all different, short ones differ as a whole."""
    seen = []
    for write, more in zip(specs, ([], others), strict=True):
        monkeypatch.setattr(readers, "_CHUNK_BYTES", chunk if write is text_file else 2**20)
        folder = tmp_path_factory.mktemp("spec")
        write(folder, [*more, *documents])
        (source,) = iter_documents(str(folder)).values()
        trained, held_out = zip(*map(split, source), strict=True)
        whole = {x.strip() for x in documents if len(x) < 1000}
        words = [
            {
                piece
                for stretch in itertools.chain.from_iterable(part)
                for piece in ([stretch.strip()] if stretch.strip() in whole else stretch.split())
            }
            for part in (trained, held_out)
        ]
        common = {"document", "of", "few", "words"} | {x.split()[1] for x in others}
        seen.append([part - common for part in words])
    (trained_here, held_here), (trained_there, held_there) = seen
    assert not held_here & trained_here
    assert not held_here & trained_there
    assert not held_there & trained_here
    assert held_here <= held_there  # the other one holds more documents


def test_a_file_is_split_alone_as_it_is_within_its_folder(tmp_path: Path) -> None:
    """What was wrong: a source of less than 256 documents had a rule of its own."""
    for i in range(300):
        text = f"document {i}\n\n\nand {i} once more\n\n\n{book(i, words=3000)}"
        (tmp_path / f"{i}.txt").write_text(text)
    (folder,) = iter_documents(str(tmp_path)).values()
    within = list(held_out_part(folder))
    alone = []
    for path in sorted(tmp_path.iterdir()):
        (source,) = iter_documents(str(path)).values()
        alone += held_out_part(source)
    assert alone == within
    assert len(within) > 300  # at least one of each book


def test_short_documents_go_whole_into_either_part() -> None:
    documents = [f"document {i}" for i in range(4000)]
    assert all(split(x) in (([x], []), ([], [x])) for x in documents)
    held_out = list(held_out_part(documents))
    assert 0.04 < len(held_out) / len(documents) < 0.06


@given(st.text(min_size=1, max_size=300), st.text(" \n\t\v\u2003", max_size=3))
@example("document 8", "\n")
def test_white_space_around_a_document_decides_nothing(document: str, space: str) -> None:
    assert bool(split(document)[1]) == bool(split(space + document + space)[1])


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(3000, 20_000))
def test_a_long_document_gives_both_parts_in_its_order(number: int, words: int) -> None:
    document = book(number, words)
    trained, held_out = split(document)
    assert trained
    assert held_out
    assert sorted(" ".join(trained + held_out).split()) == sorted(document.split())
    where = [document.index(stretch) for stretch in (*trained, *held_out)]
    assert where[: len(trained)] == sorted(where[: len(trained)])
    assert where[len(trained) :] == sorted(where[len(trained) :])
    # Cut at white space, in passages that hold a block of 256 tokens of English.
    assert all(document[start - 1] == " " for start in where if start)
    assert min(map(len, held_out)) > 1500


def test_of_long_documents_about_the_share_is_held_out() -> None:
    documents = [book(i) for i in range(100)]
    assert len(documents[0]) > 60_000
    share = sum(len(parts(x)[1]) for x in documents) / sum(map(len, documents))
    assert HELD_OUT_SHARE - 0.01 < share < HELD_OUT_SHARE + 0.02


def test_a_text_without_white_space_is_split_as_well() -> None:
    trained, held_out = parts("".join(f"{i:05}" for i in range(20_000)))
    assert len(trained) + len(held_out) == 100_000
    assert 0.01 < len(held_out) / 100_000 < 0.15


def test_passages_that_are_all_the_same_are_on_one_side() -> None:
    assert split("x" * 2**15) == (["x" * 2**15], [])


def test_a_document_that_readers_cut_is_split_as_its_parts_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_CHARS", 30_000)
    document = book(1)
    cut = split_long(document)
    assert len(cut) > 1
    trained, held_out = split(document)
    assert trained == [x for part in cut for x in split(part)[0]]
    assert held_out == [x for part in cut for x in split(part)[1]]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("lines", [3, 4, 5, 8])
def test_empty_lines_between_documents_belong_to_neither_however_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, lines: int
) -> None:
    monkeypatch.setattr(readers, "_CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    between = "\n" + "".join(f"{' ' * (i % 2)}\n" for i in range(1, lines))
    path.write_text(between.join(["one\n\n  more", "  two", "three"]))
    (source,) = iter_documents(str(path)).values()
    assert list(source) == ["one\n\n  more", "  two", "three"]


def test_two_texts_of_one_name_are_told_apart_or_refused(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for i, path in enumerate(("a.txt", "sub/a.txt")):
        Path(path).write_text("\n\n\n".join(f"{i} words of {j}" for j in range(900)))
    cut = partial(held_out_blocks, tokenizer=tiny_tokenizer, length=8, count=2)
    assert list(cut(["a.txt", "sub/a.txt"])) == ["a.txt", "sub/a.txt"]
    with pytest.raises(UserError, match=r"two texts are called a\.txt"):
        cut(["sub/a.txt", "a.txt"])
