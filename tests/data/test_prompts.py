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


@pytest.mark.parametrize("more", [1, 100])
def test_questions_are_those_that_the_model_ends_first(more: int, chats, tiny_model) -> None:
    """All tokens are alike, but that the end is `more` times as likely: random numbers tell."""
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=512)
    end, count, begun = chats.eos_token_id, 20, 30
    chances = torch.ones(300)
    chances[end] = more
    model.lm_head.register_forward_hook(lambda *x: chances.log().expand_as(x[2]))
    found = make_prompts(model, chats, {}, count=count)
    asks = chats("user: ", add_special_tokens=False).input_ids
    random = torch.Generator().manual_seed(SEED)
    drawn = [
        torch.rand(begun, generator=random, dtype=torch.float64)
        for _ in range(len(asks) + QUESTION_TOKENS)  # bos, or what stands for it, is there before
    ]
    sums = chances[: len(chats)].double().cumsum(0)
    at = torch.searchsorted(sums, torch.stack(drawn[len(asks) :], 1) * sums[-1], right=True)
    said = [row[: row.index(end)] for row in at.tolist() if end in row]
    if len(said) >= count:
        last = sorted(map(len, said))[count - 1]
        said = [row for row in said if len(row) <= last]
    wanted = [text for ids in said if (text := chats.decode(ids).strip())][:count]
    assert 1 < len(wanted) < count
    assert (more > 1) == (len(said) >= count)
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
