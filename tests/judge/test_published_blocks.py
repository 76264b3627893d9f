from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nuteprune.data.held_out import held_out_blocks
from nuteprune.errors import UserError
from nuteprune.judge.perplexity import perplexity
from nuteprune.judge.published import PROTOCOLS, changed, protocol_named
from nuteprune.judge.published_blocks import cut, make_blocks, rows_of


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; a bos at the start of whatever is tokenized with specials."""
    vocabulary = {"<s>": 0, "</s>": 1} | {chr(i): i for i in range(2, 127)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def codes(text: str) -> list[int]:
    return [ord(x) for x in text]


@given(st.integers(2, 12), st.data())
def test_every_token_but_the_first_is_predicted_once_with_overlap(
    length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length - 1))
    tokens = torch.arange(data.draw(st.integers(length, 60)))
    blocks, context = cut(tokens, length, stride)
    predicted = [x for row, skip in zip(blocks, context, strict=True) for x in row[skip:].tolist()]
    assert predicted == list(range(1, len(tokens)))
    assert (blocks[:, 1:] == blocks[:, :-1] + 1).all()


@given(st.integers(2, 12), st.data())
def test_after_a_bos_every_token_is_predicted_once(length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    tokens = torch.arange(data.draw(st.integers(length, 60)))
    blocks, context = cut(tokens, length, stride, [-1])
    assert (blocks[:, 0] == -1).all()
    predicted = [x for row, skip in zip(blocks, context, strict=True) for x in row[skip:].tolist()]
    whole = stride >= length - 1  # then what fills no block is left out
    assert predicted == list(
        range(len(tokens) // (length - 1) * (length - 1) if whole else len(tokens))
    )


def test_our_own_blocks_begin_with_bos_as_those_of_training_do(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n\n".join(f"This is document {i} of many." for i in range(90)))
    (expected,) = held_out_blocks(str(path), tokenizer, length=16, count=4).values()
    (rows,) = rows_of(str(path)).values()
    made = make_blocks(
        "text", rows.read(), tokenizer, changed(PROTOCOLS["held-out"], length=16, blocks=4)
    )
    assert torch.equal(made.tokens_NT, expected)
    assert (expected[:, 0] == 0).all()
    assert made.described["special_tokens"]
    assert (made.context_N == 1).all()


def test_plain_text_is_no_copy_of_a_published_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "wiki.test.txt").write_text("a\n\nb")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text('{"text": "a"}')
    for path in (tmp_path / "wiki.test.txt", tmp_path, "~/rows"):
        with pytest.raises(UserError, match="one Parquet or JSON file"):
            rows_of(f"wikitext2={path}")


def test_several_texts_are_no_copy_of_a_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"recipes": ["a"], "speeches": ["b"]}
    monkeypatch.setattr("nuteprune.data.demo.documents", lambda **_: texts)
    with pytest.raises(UserError, match=r"demo has 2 \(recipes, speeches\); pass one Parquet"):
        rows_of("wikitext2=demo")


def test_no_special_tokens_are_stated_where_none_were_added(
    tokenizer: PreTrainedTokenizerFast, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    protocol = changed(PROTOCOLS["nuteprune"], length=4, joining="end-of-text")
    for used, first in ((tokenizer, True), (tiny_tokenizer, False)):
        made = make_blocks("a", ["a text of some tokens"], used, protocol)
        assert made.described["special_tokens"] is first
        assert (used.bos_token_id in made.tokens_NT[0]) is first


@given(st.integers(2, 12), st.integers(0, 60))
def test_without_overlap_blocks_are_the_rows_of_a_view(length: int, more: int) -> None:
    tokens = torch.arange(length + more)
    blocks, context = cut(tokens, length, length)
    whole = len(tokens) // length
    assert torch.equal(blocks, tokens[: whole * length].view(whole, length))
    assert (context == 1).all()


def test_rows_are_joined_as_the_authors_join_them(tokenizer: PreTrainedTokenizerFast) -> None:
    protocol = changed(PROTOCOLS["nuteprune"], length=4)
    made = make_blocks("wikitext2", ["ab", "", "c"], tokenizer, protocol)
    # <s> a b \n | \n \n \n c: empty rows count, one bos in all
    assert made.tokens_NT.tolist() == [[0, *codes("ab\n")], codes("\n\n\nc")]
    assert made.described["joining"] == "blank-line"


def test_gptq_joins_ptb_by_spaces_and_takes_256_blocks(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    protocol = changed(PROTOCOLS["gptq"], length=2)
    rows = ["ab"] * 300
    made = make_blocks("ptb-test", rows, tokenizer, protocol)
    assert made.tokens_NT.shape == (256, 2)
    assert made.tokens_NT.flatten().tolist()[:7] == [0, *codes("ab ab ")]
    assert make_blocks("wikitext2", rows, tokenizer, protocol).tokens_NT[1].tolist() == codes("b\n")


def test_the_default_is_what_prune_judges_by(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n\n".join(f"document {i} with some words in it" for i in range(400)))
    protocol = changed(PROTOCOLS["held-out"], length=16, blocks=5)
    (rows,) = rows_of(str(path)).values()
    made = make_blocks("a.txt", rows.read(), tokenizer, protocol)
    (expected,) = held_out_blocks(str(path), tokenizer, length=16, count=5).values()
    assert torch.equal(made.tokens_NT, expected)
    (all_of_it,) = rows_of(str(path), whole=True).values()
    assert len(list(all_of_it.read())) == 400


def test_a_local_copy_keeps_its_empty_rows(tmp_path: Path) -> None:
    path = tmp_path / "copy.jsonl"
    rows = [{"text": ""}, {"text": " = Title = \n"}, {"text": ""}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = rows_of(f"wikitext2={path}")
    assert list(found["wikitext2"].read()) == ["", " = Title = \n", ""]


def test_names_are_single_files_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load(repo: str, **options: object) -> datasets.Dataset:
        asked[repo] = options
        return datasets.Dataset.from_dict({"text": [str(i) for i in range(1200)]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(rows_of("c4")["c4"].read()) == [str(i) for i in range(1100)]
    (options,) = asked.values()
    assert options["data_files"] == {"test": "en/c4-validation.00000-of-00008.json.gz"}
    assert options["split"] == "test"


def test_without_the_hub_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"no network at all.*--data ptb=FILE"):
        list(rows_of("ptb")["ptb"].read())


def test_overlap_gives_each_token_more_to_go_by(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    class Counts(torch.nn.Module):
        """Knows the next token the surer, the more tokens it has read."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            sure = torch.arange(1, input_ids.shape[1] + 1).float()
            following = torch.roll(input_ids, -1, 1)
            logits = torch.nn.functional.one_hot(following, 127) * sure[None, :, None]
            return type("Output", (), {"logits": logits})()

    model, text = Counts(), ["abcdefghijklmnop"]
    apart = make_blocks("a", text, tokenizer, changed(PROTOCOLS["nuteprune"], length=8))
    overlapping = make_blocks(
        "a", text, tokenizer, changed(PROTOCOLS["nuteprune"], length=8, stride=2)
    )
    first, second = (
        perplexity(model, x.tokens_NT, context=x.context_N) for x in (apart, overlapping)
    )
    for made, found in ((apart, first), (overlapping, second)):
        known = made.context_N.clamp(min=1).tolist()
        # Of the one right logit k among 126 of 0, at each position that is predicted.
        losses = [math.log(math.exp(k) + 126) - k for n in known for k in range(n, 8)]
        assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert second < first
    expected = [8] + [2] * 4 + [1]
    assert (8 - overlapping.context_N).tolist() == [expected[0] - 1, *expected[1:]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"length": 1}, "at least 2"),
        ({"stride": 0}, "between 1 and the length"),
        ({"stride": 9999}, "between 1 and the length"),
        ({"joining": "comma"}, "blank-line"),
        ({"blocks": -1}, "at least 1"),
    ],
)
def test_senseless_protocols_are_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        changed(PROTOCOLS["nuteprune"], **changes)


def test_too_short_a_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="3 tokens, and a block takes 256"):
        make_blocks("a", ["ab"], tokenizer, PROTOCOLS["held-out"])
    with pytest.raises(UserError, match="held-out, nuteprune"):
        protocol_named("nope")
