"""Smaller vocabularies: fuzzed against the tokenizers that they are cut from."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from nuteprune.errors import UserError
from nuteprune.export.checkpoint import save
from nuteprune.export.loading import load_pruned
from nuteprune.export.vocabulary import (
    check_spelling,
    cut_model,
    cut_tokenizer_of,
    merges_of,
    template_tokens,
)
from nuteprune.model.anatomy import Anatomy
from nuteprune.shrink.token_ids import renumber, tokens_in, unknown_ids
from nuteprune.shrink.vocabulary import Merges, choose, cut_tokenizer
from tests.families import each

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
SPLIT = WORDS + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def corpus() -> list[str]:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    return [*pages, "Zażółć gęślą jaźń. Übermäßig schöne Größe. Ça va très bien, l'été. " * 9]


def byte_level(special: list[str], ignores_merges: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


@cache
def llama_3() -> Tokenizer:
    tokenizer = byte_level(["<|begin_of_text|>", "<|eot_id|>", "<|reserved|>"], True)
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), template]
    )
    return tokenizer


@cache
def qwen() -> Tokenizer:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer


def sentencepiece(normalizer: Any, decoder: list[Any], split: Any = None) -> Tokenizer:
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=1200, show_progress=False)
    texts = [line.replace(" ", "▁") for page in corpus() for line in page.splitlines()]
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{x:02X}>" for x in range(256))]
    tokens += [x for x in learned["vocab"] if x not in tokens]
    if "▁" not in tokens:
        tokens.append("▁")
    # As converters write them: every pair of tokens that makes a token is a merge of its own.
    known = set(tokens)
    merges = [
        (token[:i], token[i:])
        for token in tokens[260:]
        for i in range(1, len(token))
        if {token[:i], token[i:]} <= known
    ]
    ids = {x: i for i, x in enumerate(tokens)}
    model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    if split is not None:
        tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(decoder)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"])
    runs = ("\n\n", "\n\n\n", "▁▁")
    tokenizer.add_tokens([AddedToken(x, normalized=False) for x in runs])
    return tokenizer


PIECES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def gemma() -> Tokenizer:
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    return sentencepiece(normalizers.Replace(" ", "▁"), PIECES, split)


def llama_2() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return sentencepiece(normalizer, [*PIECES, decoders.Strip(" ", 1, 0)])


STYLES: dict[str, Callable[[], Tokenizer]] = {
    "llama-3": llama_3,
    "qwen": qwen,
    "gemma": gemma,
    "llama-2": llama_2,
}


@pytest.fixture(scope="module", params=STYLES)
def full(request: pytest.FixtureRequest) -> Tokenizer:
    return STYLES[request.param]()


def counted(full: Tokenizer, text: str) -> list[float]:
    counts = Counter(full.encode(text).ids)
    return [float(counts[i]) for i in range(full.get_vocab_size())]


def cut(full: Tokenizer, keep: int, text: str) -> tuple[list[int], Tokenizer]:
    merges = Merges(json.loads(full.to_str()))
    kept = choose(merges, counted(full, text), keep)
    return kept, Tokenizer.from_str(json.dumps(cut_tokenizer(merges, kept)))


ODD = [
    *("▁", "<0x41>", "<|im_end|>", "<|eot_id|>", "<eos>", "<tool_call>", "▁▁▁", "\n\n\n\n", "\r\n"),
    *(
        "é",
        "e\u0301",
        "ﬁ",
        "Å",
        "\u200d",
        "👩‍👩‍👧",
        "日本語",
        "العربية",
        "\ufffd",
        "\x00",
        "\t",
        "   ",
    ),
]


def fuzzed(count: int) -> list[str]:
    drawn = random.Random(0)
    words = " ".join(corpus()).split(" ")

    def piece() -> str:
        kind = drawn.random()
        if kind < 0.6:
            return drawn.choice(words)
        if kind < 0.75:
            return drawn.choice(ODD)
        if kind < 0.85:
            return " " * drawn.randint(1, 4)
        high = drawn.choice([0x7F, 0x24F, 0x2FFF, 0x1FAFF])
        letters = (chr(drawn.randint(0, high)) for _ in range(drawn.randint(1, 4)))
        return "".join(x for x in letters if not 0xD800 <= ord(x) <= 0xDFFF)

    joints = ["", " "]
    return [
        drawn.choice(joints).join(piece() for _ in range(drawn.randint(0, 6))) for _ in range(count)
    ]


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_text_comes_back_as_it_did_and_kept_tokens_map_one_to_one(
    count: int, full: Tokenizer
) -> None:
    size = full.get_vocab_size()
    kept, small = cut(full, size * 2 // 3, corpus()[3])
    assert small.get_vocab_size() == len(kept) == size * 2 // 3
    new = {old: i for i, old in enumerate(kept)}
    assert {small.token_to_id(full.id_to_token(old)) for old in kept} == set(new.values())
    texts = fuzzed(count)
    alike = 0
    for special in (True, False):
        before, after = (x.encode_batch(texts, add_special_tokens=special) for x in (full, small))
        for skip in (True, False):
            was, now = (
                tokenizer.decode_batch([x.ids for x in encoded], skip_special_tokens=skip)
                for tokenizer, encoded in ((full, before), (small, after))
            )
            assert was == now
        for old, mapped in zip(before, after, strict=True):
            if new.keys() >= set(old.ids):
                assert [new[i] for i in old.ids] == mapped.ids
                alike += 1
    assert 0.1 * count < alike < 1.9 * count  # both kinds of text are among them


def test_what_costs_least_goes_first(full: Tokenizer) -> None:
    """What the choice says text becomes longer by is what the smaller tokenizer makes of it."""
    content = json.loads(full.to_str())
    merges, text = Merges(content), corpus()[2]
    size = full.get_vocab_size()
    use = counted(full, text)
    kept = set(choose(merges, use, 700))
    assert len(kept) == 700
    assert {merges.all_ids[x] for x in merges.required} <= kept
    assert all(kept.issuperset(merges.parts.get(i, ())) for i in kept)
    small = Tokenizer.from_str(json.dumps(cut_tokenizer(merges, sorted(kept))))
    longer = len(small.encode(text).ids) - len(full.encode(text).ids)
    drawn = random.Random(0)
    for _ in range(5):  # any other choice makes it longer
        other = choose(merges, [drawn.random() for _ in range(size)], 700)
        others = Tokenizer.from_str(json.dumps(cut_tokenizer(merges, other)))
        assert len(others.encode(text).ids) - len(full.encode(text).ids) > 1.5 * longer
    with pytest.raises(UserError, match=r"tokens have to stay.*pass at least \d+"):
        choose(merges, use, 100)
    with pytest.raises(UserError, match="pass fewer"):
        choose(merges, use, size)


def test_parts_are_what_a_token_is_spelled_with_when_it_alone_is_gone(full: Tokenizer) -> None:
    merges = Merges(json.loads(full.to_str()))
    drawn = random.Random(0)
    leaves = set(merges.parts) - {x for parts in merges.parts.values() for x in parts}
    names = {i: token for token, i in merges.all_ids.items()}
    plain = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    for gone in drawn.sample(sorted(leaves), 40):
        kept = [i for i in sorted(names) if i != gone]
        small = Tokenizer.from_str(json.dumps(cut_tokenizer(merges, kept) | plain))
        spelled = small.encode(names[gone]).tokens
        # Another path may make fewer parts of it than the one that BPE took.
        assert len(spelled) <= len(merges.parts[gone])
        assert "".join(spelled) == names[gone] or spelled[0].startswith("<0x")


def test_tokens_that_a_tokenizer_keeps_free_go_unless_they_are_named() -> None:
    full = qwen()
    full = Tokenizer.from_str(full.to_str())
    full.add_special_tokens([f"<|reserved_special_token_{i}|>" for i in range(9)])
    full.add_tokens(["<unused3>", "<reserved>"])
    merges = Merges(json.loads(full.to_str()))
    size, named = full.get_vocab_size(), full.token_to_id("<|reserved_special_token_7|>")
    kept = choose(merges, [1.0] * size, size - 9, [named])
    left = {full.id_to_token(i) for i in kept}
    assert {"<|reserved_special_token_7|>", "<reserved>"} <= left
    assert len([x for x in left if "reserved_special" in x or "unused" in x]) == 1
    small = Tokenizer.from_str(json.dumps(cut_tokenizer(merges, kept)))
    assert small.get_vocab_size() == size - 9
    assert small.decode(small.encode("a <unused3>").ids) == "a <unused3>"


CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", each(["llama", "qwen3", "gemma3_text"]))
def test_logits_of_kept_tokens_are_equal_to_the_bit(
    family: str, tied: bool, tiny_model, tmp_path: Path
) -> None:
    full = qwen()
    size = full.get_vocab_size()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=full, eos_token="<|im_end|>", pad_token="<|im_start|>", chat_template=CHAT
    )
    ends = {"eos_token_id": size - 2, "pad_token_id": size - 3, "bos_token_id": None}
    # More rows than tokens, as many checkpoints have.
    model = tiny_model(family, vocab_size=size + 5, tie_word_embeddings=tied, **ends)
    model.generation_config.eos_token_id = [size - 2, size - 3]
    merges = merges_of(tokenizer)
    more = template_tokens(tokenizer) | tokens_in(model.config.to_dict())
    kept = choose(merges, counted(full, corpus()[1]), 800, more)
    smaller = cut_tokenizer_of(tokenizer, merges, kept, family)
    small = cut_model(Anatomy(model), kept)
    save(small, tmp_path / "small", smaller)
    loaded = load_pruned(tmp_path / "small")
    assert type(loaded) is type(model)
    assert loaded.config.vocab_size == loaded.get_input_embeddings().weight.shape[0] == 800
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.config.eos_token_id == smaller.convert_tokens_to_ids("<|im_end|>")
    assert loaded.generation_config.eos_token_id == [
        smaller.convert_tokens_to_ids(x) for x in ("<|im_end|>", "<|im_start|>")
    ]
    new = {old: i for i, old in enumerate(kept)}
    ids = [i for i in full.encode(corpus()[1]).ids if i in new][:40]
    with torch.no_grad():
        before = model(torch.tensor([ids])).logits[..., kept]
        after = loaded(torch.tensor([[new[i] for i in ids]])).logits
    assert torch.equal(before, after)
    chat = [{"role": "user", "content": ""}]
    asked = tokenizer.apply_chat_template(chat, tokenize=False)
    assert smaller.apply_chat_template(chat, tokenize=False) == asked
    # The template's tokens are all there.
    told = tokenizer(asked).input_ids
    assert smaller(asked).input_ids == [new[i] for i in told]
    check_spelling(tokenizer, smaller, fuzzed(50))


def test_a_template_that_refuses_turns_without_words_keeps_its_tokens() -> None:
    refusing = "{% if not messages[0].content %}{{ raise_exception('say something') }}{% endif %}"
    refusing += "{{ 1 // messages[0].content | length }}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=qwen(), chat_template=refusing + CHAT)
    chat = [{"role": "user", "content": "?"}]
    said = set(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids)
    turns = set(tokenizer("user?").input_ids)
    assert said - turns
    assert said - turns <= template_tokens(tokenizer)


def test_settings_are_counted_anew() -> None:
    values = {
        "eos_token_id": [5, 9],
        "pad_token_id": 4,
        "bos_token_id": None,
        "suppress_tokens": [9, 5],
        "bad_words_ids": [[5], [9, 4]],
        "hidden_size": 5,
        "num_token_types": 5,
        "sequence_bias": [[[5, 9], -2.0], [[4], 1.0]],
        "force_words_ids": [[[5], [4]], [[9, 5]]],
        "forced_decoder_ids": [[1, 9], [2, 4]],
        "lang_to_id": {"<|en|>": 9, "<|fr|>": 4},
        "image_token_index": 9,
        "text_config": {"eos_token_id": 5, "hidden_size": 9},
    }
    assert tokens_in(values) == {4, 5, 9}
    assert renumber(values, {5: 0, 9: 1}.get) == {
        "eos_token_id": [0, 1],
        "pad_token_id": None,
        "bos_token_id": None,
        "suppress_tokens": [1, 0],
        "bad_words_ids": [[0]],
        "hidden_size": 5,
        "num_token_types": 5,
        "sequence_bias": [[[0, 1], -2.0]],
        "force_words_ids": [[[0]], [[1, 0]]],
        "forced_decoder_ids": [[1, 1]],
        "lang_to_id": {"<|en|>": 1},
        "image_token_index": 1,
        "text_config": {"eos_token_id": 0, "hidden_size": 9},
    }
    bias = {(5, 9): -2.0, (4,): 1.0}
    assert tokens_in({"sequence_bias": bias}) == {4, 5, 9}
    assert renumber({"sequence_bias": bias}, {5: 0, 9: 1}.get) == {"sequence_bias": {(0, 1): -2.0}}
    nothing = {"sequence_bias": None, "forced_decoder_ids": None, "force_words_ids": None}
    assert renumber(nothing, {}.get) == nothing


def test_settings_that_nobody_declares_are_told_where_they_could_be_tokens() -> None:
    values = {
        **{"hidden_size": 5, "eos_token_id": 3, "_inner": 5, "rate": 0.5, "name": "a", "on": True},
        **{"my_ends": [5, 9], "my_words": {"a": 7}, "my_bias": {(3,): 0.5}, "large": 10},
    }
    assert unknown_ids(values, {"hidden_size"}, 10) == ["my_ends", "my_words", "my_bias"]


def test_generation_goes_on_by_the_same_tokens(tiny_model: Any) -> None:
    """A bias, and words that are forced or barred, are of the tokens that they were of."""
    full = qwen()
    size = full.get_vocab_size()
    merges = Merges(json.loads(full.to_str()))
    model = tiny_model("llama", vocab_size=size, eos_token_id=None, bos_token_id=None)
    wanted, barred = size - 40, size - 50
    settings = model.generation_config
    settings.sequence_bias = [[[wanted], 1e4]]
    settings.bad_words_ids = [[barred]]
    kept = choose(merges, counted(full, corpus()[1]), 800, tokens_in(settings.to_dict()))
    small = cut_model(Anatomy(model), kept)
    given = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    before = model.generate(torch.tensor([kept[300:303]]), **given)[0, 3:].tolist()
    after = small.generate(torch.tensor([[300, 301, 302]]), **given)[0, 3:].tolist()
    assert before == [kept[i] for i in after] == [wanted] * 3
    assert small.generation_config.bad_words_ids == [[kept.index(barred)]]


def test_post_processors_name_their_tokens_by_the_new_ids() -> None:
    content = json.loads(llama_3().to_str())
    content["post_processor"] = {
        "type": "RobertaProcessing",
        "sep": ["<|eot_id|>", 1501],
        "cls": ["<|begin_of_text|>", 1500],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    ids = {x["content"]: x["id"] for x in content["added_tokens"]}
    content["post_processor"]["sep"][1] = ids["<|eot_id|>"]
    content["post_processor"]["cls"][1] = ids["<|begin_of_text|>"]
    merges = Merges(content)
    kept = choose(merges, [], 600)
    small = Tokenizer.from_str(json.dumps(cut_tokenizer(merges, kept)))
    encoded = small.encode("a")
    assert encoded.tokens == ["<|begin_of_text|>", "a", "<|eot_id|>"]
    assert [kept[i] for i in encoded.ids[::2]] == [ids["<|begin_of_text|>"], ids["<|eot_id|>"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram"}}, "of type Unigram"),
        ({"pre_tokenizer": None}, "neither in bytes"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "marks parts of words"),
        ({"model": {"vocab": {"a": 0, "abc": 1}}}, "no token for 2 of the 256 bytes"),
    ],
)
def test_other_tokenizers_are_refused_with_the_reason(
    changes: dict[str, Any], message: str
) -> None:
    content = json.loads(qwen().to_str())
    content["model"] |= changes.pop("model", {})
    with pytest.raises(UserError, match=message):
        Merges(content | changes)


def test_bytes_that_no_text_has_may_be_missing() -> None:
    content = json.loads(qwen().to_str())
    never = [
        x for x in "ÀÁõö÷øùúûüýþÿ" if x in content["model"]["vocab"]
    ]  # no UTF-8 has these bytes
    left = [x for x in content["model"]["vocab"] if x not in never]
    content["model"]["vocab"] = {x: i for i, x in enumerate(left)}
    for i, token in enumerate(content["added_tokens"], start=len(left)):
        token["id"] = i
    assert len(never) == 13
    full = Tokenizer.from_str(json.dumps(content))
    kept, small = cut(full, 700, corpus()[0])
    assert len(kept) == small.get_vocab_size() == 700
    said = "été 日本語 👩"
    assert small.decode(small.encode(said).ids) == full.decode(full.encode(said).ids) == said


def test_a_tokenizer_without_a_file_of_its_own_is_refused() -> None:
    class Python:
        pass

    with pytest.raises(UserError, match=r"without tokenizer\.json"):
        merges_of(Python())  # type: ignore[arg-type]
