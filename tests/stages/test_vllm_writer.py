"""Texts that vLLM writes: those that the model would write itself, if both drew alike."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nuteprune.data import decoding
from nuteprune.data.tokens import openings
from nuteprune.data.vllm_writer import VllmWriter
from nuteprune.errors import UserError
from nuteprune.jobs.options import Writing
from nuteprune.jobs.write import engine_of
from nuteprune.stages import write as stage
from tests.stages.test_write import CHAT, SHORT, VOCABULARY, copy

EOS = 2
LENGTH = 64  # room for a question that ends, and an answer
HOW: dict[str, Any] = {"tokens": 1500, "length": LENGTH, "seed": 3}


def drawn(logits_BV: Tensor, _: Tensor | None = None) -> Tensor:
    """Return tokens that are as good as drawn, but follow from the logits; many end a text."""
    chances_BV = (logits_BV * 1e4).remainder(1)
    chances_BV[..., EOS] = chances_BV[..., EOS] ** 0.05
    return chances_BV.argmax(-1)


class FakeEngine:
    """Generates as vLLM does, token by token, from a stock model without a cache."""

    model: PreTrainedModel

    def __init__(self, **how: Any) -> None:
        self.how, self.seeds = how, list[int]()
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
        )

    @torch.no_grad()
    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.answer(*x))])
            for x in zip(prompts, params, strict=True)
        ]

    def answer(self, prompt: dict[str, list[int]], params: dict[str, Any]) -> list[int]:
        assert params["temperature"] == 1
        assert params["ignore_eos"]
        self.seeds.append(params["seed"])
        found: list[int] = []
        while len(found) < params["max_tokens"]:
            ids = torch.tensor([[*prompt["prompt_token_ids"], *found]])
            logits_V = self.model(input_ids=ids, use_cache=False).logits[0, -1]
            found.append(int(drawn(logits_V[params["allowed_token_ids"] or slice(None)])))
            if found[-1] in params["stop_token_ids"]:
                break
        assert ids.shape[1] < self.how["max_model_len"]
        return found


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tiny_model) -> type[FakeEngine]:
    module = ModuleType("vllm")
    vars(module).update(LLM=FakeEngine, SamplingParams=lambda **how: how)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(decoding, "draw", drawn)
    monkeypatch.setattr(decoding, "TEXT_TOKENS", SHORT)
    FakeEngine.model = tiny_model("llama", vocab_size=VOCABULARY).double()
    return FakeEngine


@pytest.fixture
def tokenizer(tiny_tokenizer) -> PreTrainedTokenizerFast:
    return copy(tiny_tokenizer, CHAT)


def test_the_engine_writes_what_the_model_would_where_both_draw_alike(
    vllm, tokenizer, tmp_path: Path
) -> None:
    model = vllm.model
    own = stage.write(model, tokenizer, folder=tmp_path / "own", **HOW)
    engine = VllmWriter("model", torch.float64, LENGTH)
    assert engine._engine.how["dtype"] == "float64"
    texts = stage.write(model, tokenizer, folder=tmp_path / "vllm", engine=engine, **HOW)
    assert texts == own
    seeds = engine._engine.seeds
    assert len(set(seeds)) == len(seeds) > len(texts)  # a chat takes two
    opening = openings(model, tokenizer, most=LENGTH - 1, seed=HOW["seed"])
    chats = [x for x in texts if tuple(x[: len(opening.asks)]) == opening.asks]
    assert chats
    assert any(len(x) < SHORT for x in texts)
    path = tmp_path / "vllm" / stage.SELF_WRITTEN
    assert stage.read_written(path, model, tokenizer, tokens=HOW["tokens"]) == texts
    again = stage.write(model, tokenizer, folder=tmp_path / "vllm", **HOW)  # not gone on with
    assert again == own


def test_without_vllm_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm"):
        VllmWriter("model", torch.float32, 24)


def test_another_engine_is_refused() -> None:
    asked = Writing("demo", 10, Path("own.jsonl"), engine="other")
    with pytest.raises(UserError, match="--engine is other; pass torch or vllm"):
        engine_of(asked, torch.float32)


def test_a_device_is_not_for_vllm() -> None:
    asked = Writing("demo", 10, Path("own.jsonl"), engine="vllm", device="cpu")
    with pytest.raises(UserError, match="leave --device out"):
        engine_of(asked, torch.float32)
