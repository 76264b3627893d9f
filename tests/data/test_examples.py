from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from nuteprune.data.examples import Stretch, encode, holds_instructions, pad, read_examples
from nuteprune.data.held_out import split
from nuteprune.data.specs import iter_documents
from nuteprune.data.training_text import BlockDataset
from nuteprune.distill.losses import IGNORED
from nuteprune.errors import UserError

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Like those that drop the thoughts of all answers but the last.
REWRITES = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if loop.last and m.role == 'assistant' %}(new) {% endif %}{{ m.content }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
BROKEN = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_tokenizer) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    copy.chat_template = CHAT
    return copy


def write(folder: Path, rows: list[Any], name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def filler(count: int = 400) -> list[dict[str, str]]:
    """So many rows that each is either trained on or held out as a whole."""
    return [{"instruction": f"Say {i}", "output": f"number {i}"} for i in range(count)]


def learned(tokenizer: PreTrainedTokenizerFast, example: dict[str, torch.Tensor]) -> list[str]:
    """The stretches of text that are learned."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(x) for x in stretches if x]


def text(tokenizer: PreTrainedTokenizerFast, example: dict[str, torch.Tensor]) -> str:
    return tokenizer.decode(example["input_ids"])


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)],
    }


def first(spec: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> dict[str, torch.Tensor]:
    return read_examples(spec, tokenizer, **{"length": 999, **options})[0]


def test_answers_of_a_chat_are_learned_and_nothing_else(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [chat("who?", "me", "and?", "you"), *(chat(f"{i}?", "yes") for i in range(400))]
    example = first(write(tmp_path, rows), tokenizer)
    assert text(tokenizer, example) == tokenizer.apply_chat_template(
        rows[0]["messages"], tokenize=False
    )
    assert learned(tokenizer, example) == ["me</s>\n", "you</s>\n"]


def test_a_call_of_a_tool_is_no_answer_and_odd_characters_are_mended(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [chat("who? \ud83d", "", "and?", "you"), *(chat(f"{i}?", "yes") for i in range(400))]
    example = first(write(tmp_path, rows), tokenizer)
    assert learned(tokenizer, example) == ["you</s>\n"]


def test_only_the_last_answer_counts_where_a_template_rewrites_earlier_ones(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = REWRITES
    rows = [chat("who?", "me", "and?", "you"), *(chat(f"{i}?", "yes") for i in range(400))]
    example = first(write(tmp_path, rows), tokenizer)
    assert learned(tokenizer, example) == ["(new) you</s>\n"]
    assert text(tokenizer, example).startswith("<user>who?</s>\n<assistant>me</s>\n")


def test_a_template_that_hides_where_an_answer_starts_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = BROKEN
    with pytest.raises(UserError, match="cannot be told apart"):
        first(write(tmp_path, [chat("who", "me")] * 300), tokenizer)


def test_rows_of_instructions_use_the_models_template_or_alpacas(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"instruction": "Add", "input": "1 2", "output": "3"}, *filler()]
    spec = write(tmp_path, rows)
    example = first(spec, tokenizer)
    assert text(tokenizer, example) == "<user>Add\n\n1 2</s>\n<assistant>3</s>\n"
    assert learned(tokenizer, example) == ["3</s>\n"]
    for template in ("alpaca", "auto"):
        if template == "auto":
            tokenizer.chat_template = None
        example = first(spec, tokenizer, template=template)
        assert text(tokenizer, example).startswith("Below is an instruction")
        assert "### Input:\n1 2\n\n### Response:\n3</s>" in text(tokenizer, example)
        assert learned(tokenizer, example) == ["3</s>"]
    plain = read_examples(spec, tokenizer, length=999)[1]
    assert "### Input" not in text(tokenizer, plain)


def test_a_bos_is_put_first_where_the_tokenizer_does(tmp_path: Path, tiny_tokenizer) -> None:
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    starts = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    example = first(write(tmp_path, filler()), starts)
    assert example["input_ids"][:2].tolist() == starts("Below")["input_ids"][:2]
    assert example["labels"][0] == IGNORED


def test_a_bos_ends_an_answer_where_there_is_no_eos(tmp_path: Path, tiny_tokenizer) -> None:
    backend = tiny_tokenizer.backend_tokenizer
    alone = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<pad>")
    rows = [{"instruction": "Add", "input": "1 2", "output": "3"}, *filler()]
    example = first(write(tmp_path, rows), alone)
    assert example["input_ids"][-1] == alone.bos_token_id
    assert learned(alone, example) == ["3<s>"]


def test_rows_that_are_all_held_out_are_said_to_be(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    many = [{"instruction": f"Say {i}", "output": f"{i}"} for i in range(300)]
    held_out = [x for x in many if split(f"{x['instruction']}\n\n{x['output']}")[1]]
    assert held_out
    with pytest.raises(UserError, match=rf"all rows are held out to judge by \({len(held_out)}\)"):
        read_examples(write(tmp_path, held_out), tokenizer, length=32)


def test_rows_without_an_answer_are_left_out_and_long_ones_cut(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = {"instruction": "Say " + "x" * 400, "output": "never reached"}
    rows = [{"instruction": "Say", "output": ""}, long, {"messages": []}][:2] + filler()
    examples = read_examples(write(tmp_path, rows), tokenizer, length=32)
    trained = [x for x in rows if not split(f"{x['instruction']}\n\n{x['output']}".strip())[1]]
    assert examples.skipped == sum(x in trained for x in rows[:2])
    assert len(examples) == len(trained) - examples.skipped
    assert max(len(x) for x in examples.ids) <= 32
    with pytest.raises(UserError, match=r"none of .* rows has an answer within 8 tokens"):
        read_examples(write(tmp_path, rows), tokenizer, length=8)


def test_held_out_rows_are_never_learned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = write(tmp_path, filler(1000))
    source = iter_documents(spec)["a.jsonl"]
    held_out = {document.partition("\n\n")[2] for document in source if split(document)[1]}
    assert 20 < len(held_out) < 100
    examples = read_examples(spec, tokenizer, length=99)
    answers = {learned(tokenizer, x)[0].removesuffix("</s>\n") for x in examples}
    assert answers.isdisjoint(held_out)
    assert len(answers) + len(held_out) == 1000
    all_of_them = [item["input_ids"].tolist() for item in examples]
    few = {}
    for seed in (0, 0, 1):
        found = read_examples(spec, tokenizer, length=99, most=7, seed=seed)
        few.setdefault(seed, []).append([item["input_ids"].tolist() for item in found])
    assert all(
        len(x) == 7 and all(y in all_of_them for y in x) for found in few.values() for x in found
    )
    assert few[0][0] == few[0][1] != few[1][0]
    assert few[0][0] != all_of_them[:7]


def test_the_kind_of_data_is_told_by_its_first_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert holds_instructions(write(tmp_path, filler(2), "a.jsonl"))
    assert holds_instructions(write(tmp_path, [chat("who?", "me")], "b.jsonl"))
    assert not holds_instructions(write(tmp_path, [{"text": "plain"}], "c.jsonl"))
    assert not holds_instructions(write(tmp_path, filler(2), "d.jsonl"), text_column="output")
    assert not holds_instructions("demo")
    (tmp_path / "e.txt").write_text("plain")
    assert not holds_instructions(str(tmp_path / "e.txt"))
    (tmp_path / "mixed").mkdir()
    spec = write(tmp_path, filler(), "mixed/a.jsonl")
    (tmp_path / "mixed/b.txt").write_text("plain")
    assert holds_instructions(str(Path(spec).parent))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/README.txt").write_text("about the rows")
    assert not holds_instructions(
        str(Path(write(tmp_path, [{"text": "a"}], "plain/z.jsonl")).parent)
    )
    with pytest.raises(UserError, match=r"b\.txt: plain text among files of rows"):
        read_examples(str(Path(spec).parent), tokenizer, length=99)
    rows = [chat("who?", "me"), *[{"messages": "no list"}] * 300]
    with pytest.raises(UserError, match="line 2: not instruction data"):
        read_examples(write(tmp_path, rows, "f.jsonl"), tokenizer, length=99)
    with pytest.raises(UserError, match="the model knows 5 ids"):
        read_examples(write(tmp_path, filler()), tokenizer, length=99, vocab_size=5)


def test_padding_changes_nothing(tmp_path: Path, tokenizer, tiny_model) -> None:
    model = tiny_model("llama", vocab_size=300)
    rows = [{"instruction": "Say", "output": "x" * i} for i in range(1, 400)]
    examples = [read_examples(write(tmp_path, rows), tokenizer, length=60)[i] for i in (0, 5, 17)]
    batch = pad(examples, padding=7)
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["attention_mask"].sum(1).tolist() == [len(x["input_ids"]) for x in examples]
    with torch.no_grad():
        together = model(**batch).loss
        apart = [model(**{k: v[None] for k, v in x.items()}).loss for x in examples]
    counts = [int((x["labels"][1:] != IGNORED).sum()) for x in examples]
    weighed = sum(loss * n for loss, n in zip(apart, counts, strict=True)) / sum(counts)
    assert float(together) == pytest.approx(float(weighed), rel=1e-5)


def test_blocks_of_text_are_not_padded() -> None:
    blocks = BlockDataset(torch.arange(10).view(2, 5))
    batch = pad([blocks[0], blocks[1]], padding=0)
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == blocks.blocks.tolist()
    assert batch["attention_mask"].all()


def test_a_long_row_is_read_up_to_what_is_held_out_of_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [chat(*(f"{i} says {j}, " + "so " * 200 for j in range(30))) for i in range(6)]
    spec = write(tmp_path, rows)
    documents = list(iter_documents(spec, tokenizer=tokenizer)["a.jsonl"])
    held_out = [split(document)[1] for document in documents]
    assert all(len(x) > 16384 for x in documents)
    assert all(held_out)
    first_is_held = [x.strip().startswith(y[0]) for x, y in zip(documents, held_out, strict=True)]
    examples = read_examples(spec, tokenizer, length=10**6)
    read = [text(tokenizer, x) for x in examples]
    assert len(read) == first_is_held.count(False) > len(rows) // 2
    assert examples.skipped == 0
    numbers = re.compile(r"\d+ says \d+,")  # what no other row and no other turn has
    known = {x for passages in held_out for y in passages for x in numbers.findall(y)}
    shown = {x for y in read for x in numbers.findall(y)}
    assert len(shown) > 40
    assert shown.isdisjoint(known)


def test_padding_that_examples_bring_is_not_attended_to() -> None:
    ids = torch.arange(5)
    given = {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([0, 0, 1, 1, 1])}
    batch = pad([given, {"input_ids": ids, "labels": ids}], padding=0)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_stretches_go_on_where_the_text_before_them_ends(
    sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Tokenized apart, each stretch would begin with the space that such tokenizers put first."""
    parts = [Stretch("the student [/INST]", False), Stretch(" learns a teacher", True)]
    parts += [Stretch(" [INST] the", False), Stretch(" than", True)]
    found = encode(parts, sentencepiece_tokenizer, 99)
    assert found is not None
    ids, labels = (x.tolist() for x in found)
    whole = "".join(part.text for part in parts)
    assert ids == sentencepiece_tokenizer(whole, add_special_tokens=False).input_ids
    answered = [x for x in labels if x != IGNORED]
    assert sentencepiece_tokenizer.decode(answered).split() == ["learns", "a", "teacher", "than"]
