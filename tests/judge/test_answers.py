"""Answers, compared with a loop without cache or padding and with torch's own divergence."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers import ByT5Tokenizer

from nuteprune.data.prompts import Prompts
from nuteprune.data.tokens import ends_of
from nuteprune.errors import UserError
from nuteprune.judge.answers import (
    Pair,
    answer_both,
    entry_of,
    fresh,
    pick_samples,
    repeated,
)
from nuteprune.judge.answers import write as written
from tests.families import HYBRIDS, MIXTURES, each

ASKED = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30], [40, 41, 42, 43]]


def pair(pruned: list[int], kl: float = 0.0, prompt: str = "") -> Pair:
    return Pair(prompt, [1, 2], pruned, kl, 0, (0.0, 0.0))


def test_repeats_are_of_grams_of_the_same_answer() -> None:
    assert repeated([1, 2, 3]) == repeated([]) == 0
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated([7] * 10) == pytest.approx(6 / 7)
    assert [fresh(x) for x in ([], [1, 2, 3], [7] * 10, [1, 2, 3, 4, 1, 2, 3, 4])] == [0, 3, 1, 4]


@torch.no_grad()
def greedy(model, prompt: list[int], ends: set[int], most: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + most and not (len(ids) > len(prompt) and ids[-1] in ends):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", each(("llama", "phi3", "gpt_neox", "gemma2", *HYBRIDS, *MIXTURES)))
def test_answers_are_greedy_whatever_they_are_padded_to(name: str, tiny_model) -> None:
    model = tiny_model(name)
    free = [greedy(model, x, set(), 9) for x in ASKED]
    ends = {free[0][3], free[2][0]}  # some are ended, some run to the last token
    wanted = [greedy(model, x, ends, 9) for x in ASKED]
    assert len({len(x) for x in wanted}) > 1
    assert written(model, ASKED, ends, 9) == wanted
    assert written(model, ASKED, (), 9) == free


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
        {"repetition_penalty": 9.0},
        {"eos_token_id": list(range(96))},
    ],
    ids=str,
)
def test_what_a_checkpoint_says_of_generation_changes_no_answer(own: dict, tiny_model) -> None:
    model = tiny_model("llama")
    wanted = written(model, ASKED, (), 5)
    model.generation_config.update(**own)
    kept = model.generation_config
    assert written(model, ASKED, (), 5) == wanted
    assert model.generation_config is kept


def test_an_answer_is_ended_by_the_tokens_of_settings_and_tokenizer(
    tiny_model, tiny_tokenizer
) -> None:
    model = tiny_model("llama")
    eos = tiny_tokenizer.eos_token_id
    for named, ends in ((None, {eos}), (7, {7, eos}), ([7, 9], {7, 9, eos})):
        model.generation_config.eos_token_id = named
        assert ends_of(model, tiny_tokenizer) == ends


def test_answers_stop_where_positions_end(tiny_model) -> None:
    model = tiny_model("llama")  # 64 positions
    assert [len(x) for x in written(model, [[5] * 60, [6]], (), 9)] == [4, 4]
    with pytest.raises(UserError, match="64 tokens"):
        written(model, [[5] * 64], (), 9)


@torch.no_grad()
def test_figures_are_those_of_the_stock_models_logits(tiny_model, tiny_tokenizer) -> None:
    dense, pruned = tiny_model("llama").double().float(), tiny_model("llama_mha")
    pruned.train()
    prompts = Prompts(["a", "b", "c", "d"], ASKED, "of a test")
    pairs = answer_both(dense, pruned, tiny_tokenizer, prompts, 12)
    assert pruned.training
    pruned.eval()
    found = entry_of(pairs, prompts.source, 12)
    ends = set(ends_of(dense, tiny_tokenizer))
    kl, same, nats = [], [], {"before": [], "after": []}
    for ids, one in zip(ASKED, pairs, strict=True):
        assert one.dense == greedy(dense, ids, ends, 12)
        assert one.pruned == greedy(pruned, ids, ends, 12)
        read = torch.tensor([ids + one.dense])
        p, q = (x(read).logits[0, len(ids) - 1 : -1] for x in (dense, pruned))
        kl += kl_divergence(Categorical(logits=p), Categorical(logits=q)).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
        for when, answer in (("before", one.dense), ("after", one.pruned)):
            logits = dense(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
            each_one = -Categorical(logits=logits).log_prob(torch.tensor(answer))
            nats[when] += each_one[: fresh(answer)].tolist()
    count = len(kl)
    assert found["kl"] == pytest.approx(sum(kl) / count, rel=1e-4)
    assert found["agreement"] == pytest.approx(100 * sum(same) / count)
    for when, answers in (
        ("before", [x.dense for x in pairs]),
        ("after", [x.pruned for x in pairs]),
    ):
        assert found["nats"][when] == pytest.approx(sum(nats[when]) / len(nats[when]), rel=1e-4)
        assert found["length"][when] == pytest.approx(sum(map(len, answers)) / 4)
        shares = [repeated(x) for x in answers]
        assert found["repeated"][when] == pytest.approx(100 * sum(shares) / 4)
        assert found["looping"][when] == 25 * sum(x > 0.5 for x in shares)
    how = found["protocol"]
    assert (how["answers"], how["tokens"], how["most_tokens"]) == (4, count, 12)
    assert how["tokens_for_nats"] == {when: len(x) for when, x in nats.items()}
    assert how["measures"].keys() == found.keys() - {"protocol"}


def test_a_model_beside_itself_loses_nothing(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[50] = 0  # ruled out below
    handle = model.lm_head.register_forward_hook(
        lambda _, __, logits: logits.index_fill(-1, torch.tensor([50]), -torch.inf)
    )
    asked = Prompts(["a"], [[5, 6]], "of a test")
    found = entry_of(answer_both(model, model, tiny_tokenizer, asked, 8), asked.source, 8)
    handle.remove()
    assert (found["kl"], found["agreement"]) == (0, 100)
    assert found["nats"]["before"] == found["nats"]["after"] > 0


def test_those_shown_are_picked_by_repeats_then_by_divergence(tiny_tokenizer) -> None:
    loop, fine = [7] * 10, [1, 2]
    pairs = [pair(loop, 1, "c"), pair(fine, 9, "b"), pair(loop, 2, "d"), pair(fine, 3, "a")]
    picked = {x["which"]: x["prompt"] for x in pick_samples(pairs, tiny_tokenizer)}
    assert picked == {"median": "b", "worst": "d"}
    assert [x["prompt"] for x in pick_samples(pairs[:1], tiny_tokenizer)] == ["c", "c"]


def test_tokens_that_a_tokenizer_does_not_know_are_no_text() -> None:
    tokenizer = ByT5Tokenizer()
    with pytest.raises(ValueError, match="range"):
        tokenizer.decode([500])
    row = pick_samples([Pair("q", [107, 108], [500], 0, 0, (0, 0))], tokenizer)[0]
    assert row == {"which": "median", "prompt": "q", "dense": "hi", "pruned": ""}


def test_the_head_reads_the_ends_of_prompts_in_one_product(
    tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = tiny_model("llama"), []
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: read.append(x.stride()) or forward(x))
    written(model, ASKED, (), 2)
    width = model.config.hidden_size
    assert read == [(width, width, 1)] * 2
    assert not model.lm_head._forward_pre_hooks
