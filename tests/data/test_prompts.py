"""Prompts: a file's rows as a chat template puts them, and questions that a model draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from nuteprune.data.prompts import QUESTION_TOKENS, SEED, make_prompts, read_prompts
from nuteprune.errors import UserError

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chats(tiny_tokenizer) -> Any:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = CHAT
    return made


def file_of(folder: Path, *rows: Any) -> Path:
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_asked_by_the_template_and_continued_without_one(
    chats, tiny_tokenizer, tmp_path: Path
) -> None:
    path = file_of(tmp_path, {"prompt": "Why?"})
    found = read_prompts(path, chats)
    assert chats.batch_decode(found.ids) == ["user: Why?</s>assistant: "]
    assert (found.texts, found.source) == (["Why?"], "of asked.jsonl")
    plain = read_prompts(path, tiny_tokenizer)
    assert tiny_tokenizer.batch_decode(plain.ids) == ["Why?"]
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    found = read_prompts(file_of(tmp_path, chat), chats)
    said = "user: a</s>assistant: b</s>user: c</s>assistant: "
    assert (chats.batch_decode(found.ids), found.texts) == ([said], ["c"])


BAD = {
    "no prompt": ([{"text": "a"}], "neither messages nor a prompt"),
    "an empty one": ([{"prompt": " "}], "neither messages nor a prompt"),
    "no rows": ([], "holds no rows"),
    "no object": (["a"], "line 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_files_are_refused(case: str, chats, tmp_path: Path) -> None:
    rows, said = BAD[case]
    with pytest.raises(UserError, match=said):
        read_prompts(file_of(tmp_path, *rows), chats)
    with pytest.raises(UserError, match="jsonl"):
        read_prompts(tmp_path / "asked.txt", chats)
    with pytest.raises(UserError, match="template"):
        read_prompts(file_of(tmp_path, {"messages": [{"role": "user", "content": "a"}]}), _bare())


def _bare() -> Any:
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def test_questions_are_those_that_the_model_ends(chats, tiny_model) -> None:
    """All logits are equal, so that a token is what its random number says."""
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=512)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = make_prompts(model, chats, {}, count=20)
    asks = chats("user: ", add_special_tokens=False).input_ids
    random = torch.Generator().manual_seed(SEED)
    drawn = [
        torch.rand(30, generator=random, dtype=torch.float64)
        for _ in range(1 + len(asks) + QUESTION_TOKENS)  # after bos or what stands for it
    ]
    rows = (torch.stack(drawn[len(asks) :], 1) * len(chats)).long().tolist()
    ends = chats.eos_token_id
    said = [row[: row.index(ends)] for row in rows if ends in row[:QUESTION_TOKENS]]
    wanted = [text for ids in said if (text := chats.decode(ids).strip())]
    assert 1 < len(wanted) < 20
    assert found.texts == wanted
    assert chats.batch_decode(found.ids) == [f"user: {x}</s>assistant: " for x in wanted]
    assert str(SEED) in found.source


def test_models_that_do_not_chat_go_on_with_text_of_each_source(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model("llama", vocab_size=300)
    text = {"a": torch.arange(200).view(4, 50), "b": torch.arange(200, 296).view(2, 48)}
    found = make_prompts(model, tiny_tokenizer, text, count=3)
    wanted = [[*range(25)], [*range(50, 75)], [*range(200, 224)]]
    assert (found.ids, found.texts) == (wanted, tiny_tokenizer.batch_decode(wanted, True))
    long = make_prompts(model, tiny_tokenizer, {"c": torch.arange(100).view(1, 100)})
    assert long.ids == [[*range(32)]]
    with pytest.raises(UserError, match="--prompts"):
        make_prompts(model, tiny_tokenizer, {})
