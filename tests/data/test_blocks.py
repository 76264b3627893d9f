from __future__ import annotations

import contextlib
import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nuteprune.data import blocks as data
from nuteprune.data import readers
from nuteprune.data.blocks import BlockDataset, held_out_blocks, iter_documents, training_blocks
from nuteprune.data.split import HELD_OUT_SHARE, split_rule
from nuteprune.errors import UserError

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
WORDS = 2000


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per word: w7 -> id 7."""
    vocabulary = {f"w{i}": i for i in range(WORDS)}
    vocabulary |= {token: WORDS + i for i, token in enumerate(["<unk>", *special.values()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", model_max_length=8, **special
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(eos_token="</s>", bos_token="<s>")


def words(start: int, count: int) -> str:
    return " ".join(f"w{i % WORDS}" for i in range(start, start + count))


def write_text(folder: Path, documents: list[str], name: str = "a.txt") -> str:
    path = folder / name
    path.write_text("\n\n\n".join(documents))
    return str(path)


def write_rows(folder: Path, rows: list[object], name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def only(spec: str, **options: Any) -> list[str]:
    (documents,) = iter_documents(spec, **options).values()
    return list(documents)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    texts = {
        name: [words(start + 10 * i, 10) for i in range(60)]
        for name, start in [("wikipedia", 0), ("speeches", 600), ("recipes", 1200)]
    }
    monkeypatch.setattr(data.assets, "documents", lambda: texts)
    return texts


class TestDocuments:
    def test_demo_has_its_three_sources(self, demo: dict[str, list[str]]) -> None:
        found = iter_documents("demo")
        assert {name: list(texts) for name, texts in found.items()} == demo

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

    def test_a_folder_is_one_source(self, tmp_path: Path) -> None:
        folder = tmp_path / "corpus"
        (folder / "deep").mkdir(parents=True)
        (folder / ".cache").mkdir()
        write_text(folder, ["three"], "deep/b.txt")
        write_rows(folder, [{"content": "one"}], "a.jsonl")
        write_rows(folder, [{"text": "two"}], "b.json")
        write_rows(folder, [{"nothing": 1}], ".cache/c.json")
        (folder / "empty.txt").touch()
        (folder / "README.md").write_text("no text")
        (name,) = iter_documents(str(folder))
        assert name == "corpus"
        assert only(str(folder)) == ["one", "two", "three"]

    def test_the_named_column_is_read(self, tmp_path: Path) -> None:
        spec = write_rows(tmp_path, [{"text": "no", "story": "yes"}, {"story": None}])
        assert only(spec, text_column="story") == ["yes"]

    def test_instructions_are_joined(self, tmp_path: Path) -> None:
        rows: list[object] = [
            {"instruction": "Do", "output": "done"},
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {"instruction": "Do", "input": "", "output": "done"},
        ]
        spec = write_rows(tmp_path, rows)
        assert only(spec) == ["Do\n\ndone", "Add\n\n1 2\n\n3", "Do\n\ndone"]

    def test_chat_is_rendered(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
        spec = write_rows(tmp_path, [{"messages": turns}])
        tokenizer.chat_template = CHAT
        assert only(spec, tokenizer=tokenizer) == ["<user>hi\n<assistant>yo\n"]

    def test_the_day_is_no_part_of_a_chat(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = write_rows(tmp_path, [{"messages": [{"role": "user", "content": "hi"}]}])
        monkeypatch.setattr(tokenizer, "chat_template", "{{ strftime_now('%d %b %Y') }} " + CHAT)
        assert only(spec, tokenizer=tokenizer) == ["26 Jul 2024 <user>hi\n"]

    def test_instructions_that_are_there_as_text_too_are_instructions(self, tmp_path: Path) -> None:
        row = {"instruction": "Say it", "input": "", "output": "yes", "text": "Below is Say it yes"}
        assert only(write_rows(tmp_path, [row])) == ["Say it\n\nyes"]

    def test_lone_surrogates_are_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(r'{"text": "a \ud800 b \ud83d\ude00"}')
        assert only(str(path)) == ["a \ufffd b \U0001f600"]


class TestHub:
    def test_is_streamed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[object] = []

        def rows() -> Iterator[dict[str, str]]:
            for i in itertools.count():
                yield {"text": f"document {i}"}

        def load(*arguments: object, **options: object) -> datasets.IterableDataset:
            asked.append((arguments, options))
            return datasets.IterableDataset.from_generator(rows)

        monkeypatch.setattr(datasets, "load_dataset", load)
        for spec in ("a/b", "b:c", "b:c:validation"):
            found = iter_documents(spec)
            assert list(found) == [spec]
            assert list(itertools.islice(found[spec], 2)) == ["document 0", "document 1"]
        assert asked == [
            (("a/b", None), {"split": "train", "streaming": True}),
            (("b", "c"), {"split": "train", "streaming": True}),
            (("b", "c"), {"split": "validation", "streaming": True}),
        ]

    def test_what_the_hub_says_is_passed_on_in_a_line(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: object, **__: object) -> None:
            raise ConnectionError("cannot\nreach")

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(UserError, match=r"a/b: neither .*\(cannot reach\); pass a path"):
            only("a/b")


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

    def test_a_missing_column_names_those_seen_and_the_nearest(self, tmp_path: Path) -> None:
        spec = write_rows(tmp_path, [{"id": 1, "story": "x"}])
        with pytest.raises(UserError, match=r"'storey' among .* 'id', 'story'; .*perhaps 'story'"):
            only(spec, text_column="storey")

    def test_of_many_columns_some_are_named(self, tmp_path: Path) -> None:
        spec = write_rows(tmp_path, [{f"c{i}": i for i in range(1000)}])
        with pytest.raises(UserError, match=r"'c19', \.\.\.; name"):
            only(spec)

    @pytest.mark.parametrize(
        ("template", "turn", "message"),
        [
            (None, {"role": "user", "content": "hi"}, "no chat template; pass a model"),
            ("{{ raise_exception('no') }}", {"role": "user", "content": "hi"}, "refuses .*no"),
            ("{{ 1 + 'a' }}", {"role": "user", "content": "hi"}, "refuses"),
            (CHAT, {"from": "human", "value": "hi"}, "not chat messages"),
            (CHAT, {"role": "user", "content": [1]}, "not chat messages"),
        ],
    )
    def test_chat_that_cannot_be_rendered(
        self, tmp_path: Path, template: str | None, turn: object, message: str
    ) -> None:
        tokenizer = make_tokenizer(eos_token="</s>")
        tokenizer.chat_template = template
        spec = write_rows(tmp_path, [{"messages": [turn]}])
        with pytest.raises(UserError, match=message):
            only(spec, tokenizer=tokenizer)

    @pytest.mark.parametrize(
        "spec", ["", " ", "no.txt", "./no/where", "/no/where", "a/b/c", "a:b:c:d", "C:\\x", "a\0"]
    )
    def test_a_spec_that_is_nothing(self, spec: str) -> None:
        with pytest.raises(UserError, match="no such file or folder; pass demo, a path"):
            iter_documents(spec)

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
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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


class TestSplit:
    @settings(max_examples=50, deadline=None)
    @given(documents=st.lists(st.text(min_size=1, max_size=300), max_size=30))
    def test_few_documents_give_a_share_without_overlap(self, documents: list[str]) -> None:
        parts = {text: split_rule(documents)(text) for text in documents}
        assert all(train + held == text for text, (train, held) in parts.items())
        held_out = sum(len(held) for _, held in parts.values())
        exact = HELD_OUT_SHARE * sum(map(len, parts))
        assert exact - 1 <= held_out <= exact + 257
        assert sum(bool(train and held) for train, held in parts.values()) <= 1

    def test_one_long_document_is_cut_at_white_space(self) -> None:
        text = words(0, 1000)
        train, held = split_rule([text])(text)
        assert train + held == text
        assert train.endswith(" ")
        assert 0.04 < len(held) / len(text) < 0.06

    def test_many_documents_go_whole_into_either_part(self) -> None:
        documents = [f"document {i}" for i in range(4000)]
        rule = split_rule(documents)
        held_out = {text for text in documents if rule(text) == ("", text)}
        assert all(rule(text) == (text, "") for text in documents if text not in held_out)
        assert 0.04 < len(held_out) / len(documents) < 0.06
        # ... the same one whatever else there is.
        assert {text for text in documents[:1000] if split_rule(documents[:1000])(text)[1]} == {
            text for text in documents[:1000] if text in held_out
        }

    def test_repeated_documents_are_not_many(self) -> None:
        train, held = split_rule(["one two three " * 10] * 1000)("one two three " * 10)
        assert train
        assert held

    def test_reads_no_more_than_it_needs(self) -> None:
        assert split_rule(f"document {i}" for i in itertools.count())


class TestBlocks:
    def test_shapes_and_labels(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        spec = write_text(tmp_path, [words(0, 400)])
        blocks = training_blocks(spec, tokenizer, length=16, count=10, seed=0)
        assert isinstance(blocks, BlockDataset)
        assert len(blocks) == len(list(blocks)) == 10
        assert blocks[0].keys() == {"input_ids", "labels"}
        assert blocks[3]["input_ids"].shape == (16,)
        assert blocks[3]["input_ids"].dtype == torch.long
        assert torch.equal(blocks[3]["input_ids"], blocks[3]["labels"])
        (held_out,) = held_out_blocks(spec, tokenizer, length=16, count=10).values()
        assert held_out.shape == (1, 16)
        assert held_out.dtype == torch.long

    @pytest.mark.parametrize(
        ("special", "end"),
        [
            ({"bos_token": "<s>", "eos_token": "</s>"}, [WORDS + 2]),
            ({"bos_token": "<s>"}, [WORDS + 1]),
            ({}, []),
        ],
    )
    def test_documents_are_joined_by_eos_or_bos_or_nothing(
        self, tmp_path: Path, special: dict[str, str], end: list[int]
    ) -> None:
        spec = write_text(tmp_path, ["w0 w1", "w5 w6"])
        cycle = [0, 1, *end, 5, 6, *end]
        blocks = training_blocks(spec, make_tokenizer(**special), length=4, count=1, seed=0)
        ids = blocks[0]["input_ids"].tolist()
        assert ids in [(cycle * 2)[i : i + 4] for i in (0, 2 + len(end))]

    def test_each_block_begins_as_the_tokenizer_begins_a_text(self, tmp_path: Path) -> None:
        first, plain = make_tokenizer(eos_token="</s>", bos_token="<s>"), make_tokenizer()
        bos = first.bos_token_id
        first._tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
        spec = write_text(tmp_path, [words(0, 400)])
        blocks = training_blocks(spec, first, length=16, count=10, seed=0).blocks
        assert (blocks[:, 0] == bos).all()
        assert not (blocks[:, 1:] == bos).any()
        cut = training_blocks(spec, make_tokenizer(eos_token="</s>"), length=15, count=10, seed=0)
        end = cut.blocks.clone()
        end[end == WORDS + 1] = first.eos_token_id
        assert torch.equal(blocks[:, 1:], end)
        (held_out,) = held_out_blocks(spec, first, length=8, count=3).values()
        assert held_out.shape[1] == 8
        assert (held_out[:, 0] == bos).all()
        (bare,) = held_out_blocks(spec, plain, length=7, count=3).values()
        assert torch.equal(held_out[:, 1:], bare)

    def test_sources_take_turns(
        self, demo: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        blocks = training_blocks("demo", tokenizer, length=8, count=20, seed=0)
        sources = [int(x["input_ids"][x["input_ids"] < WORDS][0]) // 600 for x in blocks]
        assert sources == [i % 3 for i in range(20)]

    def test_seeds_draw_the_text(
        self, demo: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        def draw(seed: int) -> torch.Tensor:
            return training_blocks("demo", tokenizer, length=8, count=6, seed=seed).blocks

        assert torch.equal(draw(3), draw(3))
        assert set(draw(3).flatten().tolist()) != set(draw(4).flatten().tolist())

    def test_a_few_blocks_come_from_all_over_a_long_document(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        spec = write_text(tmp_path, [words(0, 1500)])
        drawn = training_blocks(spec, tokenizer, length=8, count=20, seed=0).blocks
        ids = drawn[drawn < WORDS]
        assert [int(((ids >= x) & (ids < x + 500)).sum() > 0) for x in (0, 500, 1000)] == [1, 1, 1]
        runs = (drawn[:, 1:] == drawn[:, :-1] + 1).float().mean()
        assert runs > 0.8  # in passages, not word by word

    def test_held_out_text_is_never_trained_on(
        self, demo: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        blocks = training_blocks("demo", tokenizer, length=16, count=500, seed=0)
        trained = set(blocks.blocks.flatten().tolist())
        held_out = held_out_blocks("demo", tokenizer, length=8, count=100)
        assert list(held_out) == list(demo)
        held = set(torch.cat(list(held_out.values())).flatten().tolist())
        assert trained & held <= {tokenizer.eos_token_id}
        assert len(trained | held) > 0.95 * 1800

    def test_short_text_is_cycled(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        spec = write_text(tmp_path, [words(0, 40)])
        blocks = training_blocks(spec, tokenizer, length=16, count=50, seed=0)
        assert len(blocks) == 50
        assert 36 <= len(set(blocks.blocks.flatten().tolist()) - {WORDS + 1}) <= 38

    def test_fewer_blocks_than_sources(
        self, demo: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        assert len(training_blocks("demo", tokenizer, length=8, count=1, seed=0)) == 1

    def test_text_shorter_than_a_block(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        spec = write_text(tmp_path, [words(0, 40)])
        with pytest.raises(UserError, match=r"training part.: 39 tokens, and a block takes 64; pa"):
            training_blocks(spec, tokenizer, length=64, count=1, seed=0)
        with pytest.raises(UserError, match=r"held-out part.: 3 tokens, and a block takes 64"):
            held_out_blocks(spec, tokenizer, length=64, count=1)

    @pytest.mark.parametrize(("length", "count"), [(1, 1), (8, 0), (-1, 1)])
    def test_sizes_that_make_no_block(
        self,
        demo: dict[str, list[str]],
        tokenizer: PreTrainedTokenizerFast,
        length: int,
        count: int,
    ) -> None:
        for make in (lambda **x: training_blocks(seed=0, **x), held_out_blocks):
            with pytest.raises(UserError, match="pass at least 1 block of at least 2"):
                make(spec="demo", tokenizer=tokenizer, length=length, count=count)

    def test_ids_must_be_known_to_the_model(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        spec = write_text(tmp_path, [words(0, 400)])
        highest = WORDS + 1
        makers: list[Callable[..., object]] = [
            lambda **x: training_blocks(spec, tokenizer, length=8, count=90, seed=0, **x),
            lambda **x: held_out_blocks(spec, tokenizer, length=20, count=1, **x),
        ]
        for make in makers:
            make(vocab_size=highest + 1)
            with pytest.raises(UserError, match=f"token id {highest}, but the model knows"):
                make(vocab_size=highest)


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
