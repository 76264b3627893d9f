from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nuteprune.judge.perplexity import (
    bits_per_character,
    mean,
    perplexities,
    perplexity,
    protocol,
)

VOCABULARY = 61


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def blocks(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def test_is_exp_of_the_models_own_loss(model: LlamaForCausalLM) -> None:
    tokens = blocks(7, 12)
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss
    assert perplexity(model, tokens, batch_size=3) == pytest.approx(math.exp(loss), rel=1e-5)


def test_weighs_all_predicted_tokens_alike(model: LlamaForCausalLM) -> None:
    tokens = blocks(3, 9)
    with torch.no_grad():
        log_probabilities = model(input_ids=tokens).logits.double().log_softmax(-1)
    likelihoods = [
        -float(log_probabilities[n, t, tokens[n, t + 1]]) for n in range(3) for t in range(8)
    ]
    expected = math.exp(sum(likelihoods) / len(likelihoods))
    assert perplexity(model, tokens) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 9), length=st.integers(2, 20), batch_size=st.integers(1, 10))
def test_is_the_same_whatever_the_batch_size(
    model: LlamaForCausalLM, count: int, length: int, batch_size: int
) -> None:
    tokens = blocks(count, length, seed=count)
    expected = perplexity(model, tokens, batch_size=1)
    assert perplexity(model, tokens, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_is_the_same_however_the_positions_are_chunked(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = blocks(2, 11)
    expected = perplexity(model, tokens)
    monkeypatch.setattr("nuteprune.judge.perplexity._POSITIONS", 3)
    assert perplexity(model, tokens) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_vocabularys_size(model: LlamaForCausalLM) -> None:
    class Uniform(nn.Linear):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            assert not use_cache
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))

    assert perplexity(Uniform(1, 1), blocks(3, 5)) == pytest.approx(VOCABULARY, rel=1e-6)


def test_a_broken_model_has_infinite_perplexity() -> None:
    class Certain(nn.Linear):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            logits = torch.zeros(*input_ids.shape, VOCABULARY)
            logits[..., 0] = 1e5
            return SimpleNamespace(logits=logits)

    assert perplexity(Certain(1, 1), torch.ones(2, 4, dtype=torch.long)) == math.inf


def test_half_precision_logits_are_summed_in_float32(model: LlamaForCausalLM) -> None:
    tokens = blocks(6, 30)
    try:
        model.bfloat16()
        with torch.no_grad():
            logits = model(tokens).logits[:, :-1].double()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert perplexity(model, tokens) == pytest.approx(float(losses.exp()), rel=1e-4)
    finally:
        model.float()


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_each_module_in_the_mode_it_was_in(model: LlamaForCausalLM, fails: bool) -> None:
    model.train()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    seen: list[bool] = []

    def observe(module: nn.Module, *_: object) -> None:
        seen.append(any(part.training for part in module.modules()) or torch.is_grad_enabled())
        if fails:
            raise RuntimeError

    handle = model.register_forward_pre_hook(observe)
    try:
        if fails:
            with pytest.raises(RuntimeError):
                perplexity(model, blocks(1, 4))
        else:
            perplexity(model, blocks(1, 4))
        assert seen == [False]
        assert [module.training for module in model.modules()] == before
    finally:
        handle.remove()
        model.eval()


def test_sources_keep_their_order_and_have_a_plain_mean(model: LlamaForCausalLM) -> None:
    sources = {"b": blocks(2, 8, 1), "a": blocks(5, 8, 2)}
    found = perplexities(model, sources, batch_size=2)
    assert list(found) == ["b", "a"]
    assert found["a"] == pytest.approx(perplexity(model, sources["a"]), rel=1e-5)
    assert mean(found) == pytest.approx((found["a"] + found["b"]) / 2)


def test_the_protocol_names_length_and_count_and_fits_json() -> None:
    record = json.loads(json.dumps(protocol({"b": blocks(2, 8), "a": blocks(5, 8)})))
    assert record["block_length"] == {"b": 8, "a": 8}
    assert record["block_count"] == {"b": 2, "a": 5}
    assert "eos" in record["joining"]


@pytest.mark.parametrize("end", [None, 7])
def test_bits_are_of_all_tokens_that_something_stands_before(
    model: LlamaForCausalLM, end: int | None
) -> None:
    ids = {"abc": [3, 9, 4], "de": [11, 5], "f": [6]}

    class Letters(SimpleNamespace):
        def __call__(self, text: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[*ids.get(text, [])])

    tokenizer = Letters(bos_token_id=None, eos_token_id=end)
    start, nats = [] if end is None else [end], 0.0
    for text in ids.values():
        row = torch.tensor([[*start, *text]])
        logits = model(input_ids=row).logits.detach()[0, :-1].double().log_softmax(-1)
        nats -= float(logits.gather(1, row[0, 1:, None]).sum())
    found = bits_per_character(model, tokenizer, list(ids))  # type: ignore[arg-type]
    assert found == pytest.approx(nats / math.log(2) / 6, rel=1e-4)
