from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from nuteprune.errors import UserError

from .conftest import CHAT, make_tokenizer, only, write_rows


class TestDocuments:
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


class TestErrors:
    def test_a_missing_column_names_those_seen_and_the_nearest(self, tmp_path: Path) -> None:
        spec = write_rows(tmp_path, [{"id": 1, "story": "x"}])
        with pytest.raises(UserError, match=r"'storey' among .* 'id', 'story'; .*perhaps 'story'"):
            only(spec, text_column="storey")

    @pytest.mark.parametrize("lines", [1, 3])
    def test_messages_that_are_in_no_chat(self, tmp_path: Path, lines: int) -> None:
        """Each would be a document of its own, and no chat."""
        path = tmp_path / "a.jsonl"
        chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        path.write_text(f"{json.dumps(chat)}\n" * lines)
        with pytest.raises(UserError, match=r"a chat message by itself; .* --text-column"):
            only(str(path))
        assert only(str(path), text_column="content") == ["hi", "yes"] * lines

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
            ("{{ 1 / 0 }}", {"role": "user", "content": "hi"}, "refuses .*by zero"),
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
