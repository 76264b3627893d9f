from __future__ import annotations

import contextlib
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from nuteprune.data import readers
from nuteprune.data.held_out import held_out_blocks
from nuteprune.data.specs import iter_documents
from nuteprune.data.training_text import training_blocks
from nuteprune.errors import UserError

from .conftest import CHAT, only, words, write_rows, write_text


class TestDocuments:
    def test_can_be_read_again(self, tmp_path: Path) -> None:
        (documents,) = iter_documents(write_text(tmp_path, ["a", "b"])).values()
        assert list(documents) == list(documents) == ["a", "b"]

    def test_text_is_split_at_two_or_more_empty_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes("\ufeffone\r\n\r\nstill one\r\n \r\n\t\r\n\r\ntwo\n\n\n\n".encode())
        assert only(str(path)) == ["one\n\nstill one", "two"]

    def test_text_without_empty_lines_is_one_document(self, tmp_path: Path) -> None:
        assert only(write_text(tmp_path, ["one\n\nmore\nend"])) == ["one\n\nmore\nend"]

    @pytest.mark.parametrize("chunk", [1, 2, 3, 7])
    def test_text_is_the_same_however_it_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
    ) -> None:
        monkeypatch.setattr(readers, "_CHUNK_BYTES", chunk)
        spec = write_text(tmp_path, ["é one\n\nmore", "two", "日本"])
        assert only(spec) == ["é one\n\nmore", "two", "日本"]

    def test_a_long_document_comes_in_pieces_cut_at_white_space(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(readers, "MAX_DOCUMENT_CHARS", 10)
        text = "some words " + "x" * 25 + " and more"
        for spec in (write_text(tmp_path, [text]), write_rows(tmp_path, [{"text": text}])):
            pieces = only(spec)
            assert "".join(pieces) == text
            assert max(map(len, pieces)) <= 10
            assert pieces[0] == "some "

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
    def test_json_may_be_lines_or_a_list(self, tmp_path: Path, name: str) -> None:
        rows: list[object] = [{"text": "one", "id": 1}, {"id": 2, "text": "two\n"}]
        assert only(write_rows(tmp_path, rows, name)) == ["one", "two\n"]
        (tmp_path / name).write_text(json.dumps(rows, indent=2))
        assert only(str(tmp_path / name)) == ["one", "two\n"]

    @pytest.mark.parametrize("chunk", [1, 5])
    def test_json_is_the_same_however_it_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
    ) -> None:
        monkeypatch.setattr(readers, "_CHUNK_BYTES", chunk)
        spec = write_rows(tmp_path, [{"text": 'o"n]e'}, {"text": "é\\"}, {"txt": ""}])
        with pytest.raises(UserError, match="line 3: no column 'text' among the columns 'txt'"):
            only(spec)

    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        texts = [f"row {i}" for i in range(200)] + [None]
        parquet.write_table(pa.table({"id": range(201), "content": texts}), path)
        assert only(str(path)) == texts[:-1]

    def test_parquet_chat_and_wrong_column(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        path = tmp_path / "a.parquet"
        turns = [[{"role": "user", "content": "hi", "extra": 1}]]
        parquet.write_table(pa.table({"messages": turns, "n": [3]}), path)
        tokenizer.chat_template = CHAT
        assert only(str(path), tokenizer=tokenizer) == ["<user>hi\n"]
        with pytest.raises(UserError, match="row 1: column 'n' holds int, not text"):
            only(str(path), text_column="n")
        with pytest.raises(UserError, match=r"no column 'massages'.*perhaps 'messages'"):
            only(str(path), text_column="massages")


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"text": "a"}\n\n{"text": "b"\n{"text": "c"}', "line 3: not JSON .*; pass one obj"),
            (b'{"text": "a"} oops', "line 1: not JSON"),
            (b'{"text": "a\nb"}', "line 1: not JSON .Invalid control character"),
            (b'{"text": "a"}\n"b"', "line 2: a row must be an object .* not str; pass rows"),
            (b'{"text": "a"}\n{"txt": "b"}', "line 2: no column 'text' .* 'txt'; .*perhaps 'txt'"),
            (b'{"id": 1, "Text": "b"}', "line 1: found no text .* 'id', 'Text'; .*perhaps 'Text'"),
            (b'{"id": 1}', "found no text among the columns 'id'; name the one .* --text-column$"),
            (b"{}", r"columns \(none\)"),
            (b'{"text": 3}', "line 1: column 'text' holds int, not text; name another"),
            (b'{"text": ["a"]}', "column 'text': a list that is not chat messages; pass"),
            (b'{"text": "\xff"}', "not UTF-8 .byte 0xff at offset 10.; pass a file saved as"),
            (b'\xef\xbb\xbf{"text": "\xff"}', "offset 13"),
            (b'{"text": "\xc3', "not UTF-8 .byte 0xc3 at offset 10"),
            (b'{"a":' * 100_000, "line 1: not JSON"),
            (b'{"text": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
            (b"", "holds no text; pass a source"),
            (b'{"text": " \\n"}', "holds no text"),
        ],
    )
    def test_a_bad_file_is_named_and_its_fault_told_in_a_line(
        self, tmp_path: Path, content: bytes, message: str
    ) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            only(str(path))
        assert "a.jsonl" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_an_endless_row_is_given_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(readers, "_CHUNK_BYTES", 100)
        monkeypatch.setattr(readers, "_MAX_JSON_ROW_CHARS", 1000)
        spec = write_rows(tmp_path, [{"text": "a"}, {"text": "b" * 5000}])
        with pytest.raises(UserError, match=r"line 2: .*at most 1000 characters"):
            only(spec)

    def test_files_that_hold_no_text(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"found nothing\); pass \.txt"):
            iter_documents(str(tmp_path))
        (tmp_path / "a.csv").touch()
        for path in (tmp_path, tmp_path / "a.csv"):
            with pytest.raises(UserError, match=r"found \.csv\); pass \.txt"):
                iter_documents(str(path))

    def test_a_broken_parquet_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        for content in (b"", b"PAR1 but not really PAR1"):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"a.parquet: cannot be read"):
                only(str(path))

    def test_a_file_that_is_gone(self, tmp_path: Path) -> None:
        spec = write_text(tmp_path, ["a"])
        (documents,) = iter_documents(spec).values()
        Path(spec).unlink()
        with pytest.raises(UserError, match=r"a.txt: cannot be read .*; pass another file"):
            list(documents)


JSON_PIECES = ['{"text": ', '"a"', "}", "\n", "[", "]", ",", "{", ":", "null", "1", '"', "\\", " "]


@settings(
    max_examples=5 * settings().max_examples,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.binary(max_size=60)
    | st.lists(st.sampled_from(JSON_PIECES)).map(lambda pieces: "".join(pieces).encode()),
    suffix=st.sampled_from(readers.SUFFIXES),
    chunk=st.integers(1, 70),
)
def test_any_bytes_give_documents_or_a_user_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
    content: bytes,
    suffix: str,
    chunk: int,
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    monkeypatch.setattr(readers, "_CHUNK_BYTES", chunk)
    for read in (
        lambda: only(str(path), tokenizer=tokenizer),
        lambda: training_blocks(str(path), tokenizer, length=2, count=2, seed=0),
        lambda: held_out_blocks(str(path), tokenizer, length=2, count=2),
    ):
        with contextlib.suppress(UserError):
            assert read()


@pytest.mark.parametrize("separator", ["\n\n\n", "\n", " "])
def test_a_large_file_is_read_in_bounded_memory_and_no_further_than_needed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, separator: str
) -> None:
    path = tmp_path / "large.txt"
    document = words(0, 200) + separator
    with path.open("w") as file:
        for _ in range(20_000):
            file.write(document)
    assert path.stat().st_size > 15e6
    (documents,) = iter_documents(str(path)).values()
    tracemalloc.start()
    try:
        total = sum(map(len, documents))
        assert tracemalloc.get_traced_memory()[1] < 15e6
    finally:
        tracemalloc.stop()
    assert total > 0.95 * path.stat().st_size
    # A fault at the end is not found by who reads the beginning.
    with path.open("ab") as broken:
        broken.write(b"\xff")
    assert next(iter(documents))
    with pytest.raises(UserError, match="byte 0xff"):
        list(documents)
