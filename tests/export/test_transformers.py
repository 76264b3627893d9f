"""A pruned checkpoint in the hands of transformers and PEFT, by remote code as users load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nuteprune.export.checkpoint import recount, save
from tests.families import dense, each

TOKENS = torch.tensor([[40, 5, 77, 12, 9, 33, 25, 61, 14, 8]])


@pytest.fixture(params=each(["llama", "qwen3", "gpt_neox"]))
def folder(
    request: pytest.FixtureRequest,
    tiny_model: Callable,
    prune_at_random: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    model = tiny_model(request.param)
    gates = ("heads", "neurons") if request.param == "gpt_neox" else ("kv_groups", "neurons")
    small = prune_at_random(model, gates, "free")
    assert small.config.model_type == f"pruned_{request.param}"  # by chance it could be uniform
    save(small, tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, **how: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("name", each(dense()))
def test_pruned_models_are_saved_under_the_names_of_stock_checkpoints(
    name: str, tiny_model: Callable, prune_at_random: Callable, tmp_path: Path
) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "stock")
    save(prune_at_random(model, ("neurons",), "free"), tmp_path / "pruned")
    ours, theirs = (recount(tmp_path / x)["tensors"].keys() for x in ("pruned", "stock"))
    assert ours == theirs


def test_bfloat16(folder: Path) -> None:
    exact, half = load(folder, dtype=torch.float32), load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (logits(half).float() - logits(exact)).abs().max() < 0.05 * logits(exact).abs().max()
    how = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 4, "do_sample": False}
    assert half.generate(TOKENS, **how).shape[1] > TOKENS.shape[1]


def test_device_map_and_meta_init(folder: Path) -> None:
    placed = load(folder, dtype=torch.float32, device_map={"": "cpu"})
    assert torch.equal(logits(placed), logits(load(folder, dtype=torch.float32)))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert all(p.is_meta for p in empty.parameters())
    shapes = {name: p.shape for name, p in empty.named_parameters()}
    assert shapes == {name: p.shape for name, p in placed.named_parameters()}


def test_shards_are_spread_over_memory_and_disk(folder: Path, tmp_path: Path) -> None:
    """As `device_map="auto"` does it where a model does not fit: by whole decoder layers."""
    whole = load(folder, dtype=torch.float32)
    save(whole, tmp_path / "split", max_shard_size="10KB")
    assert len(list((tmp_path / "split").glob("model-*.safetensors"))) > 2
    size = 4 * sum(p.numel() for p in whole.parameters())
    spread = load(
        tmp_path / "split",
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": size * 2 // 3},
        offload_folder=tmp_path / "offload",
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(logits(spread), logits(whole))


@pytest.mark.parametrize("tied", [False, True])
def test_empty_init_then_weights(
    tied: bool, tiny_model: Callable, prune_at_random: Callable, tmp_path: Path
) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    model = prune_at_random(model, ("kv_groups", "neurons"), "free")
    assert model.config.model_type == "pruned_qwen2"
    save(model, tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert all(p.is_meta for p in empty.parameters())
    empty.tie_weights()  # else a tied head stays empty
    filled = load_checkpoint_and_dispatch(empty, tmp_path / "model", device_map={"": "cpu"})
    assert torch.equal(logits(filled), logits(model))


def test_generation(folder: Path) -> None:
    """Padded, with a static cache, by beams, by guesses from the prompt: as without any of it."""
    model = load(folder, dtype=torch.float32)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def made(tokens: Tensor = TOKENS, **more: Any) -> list[int]:
        mask = (tokens != 0).long()
        return model.generate(tokens, attention_mask=mask, **how, **more)[0].tolist()

    expected = made(use_cache=False)
    assert made() == made(cache_implementation="static") == expected
    assert made(prompt_lookup_num_tokens=2) == expected
    padded = torch.nn.functional.pad(TOKENS, (3, 0))
    assert made(padded) == made(padded, cache_implementation="static") == [0, 0, 0, *expected]
    assert made(num_beams=3) == made(num_beams=3, use_cache=False)


def test_lora_on_top_trains_merges_and_comes_back(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    targets = "all-linear"
    model = get_peft_model(
        load(folder, dtype=torch.float32),
        LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"),
    )
    before = logits(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    tuned = logits(model)
    assert not torch.allclose(tuned, before, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder, dtype=torch.float32), tmp_path / "adapter")
    assert torch.allclose(logits(again.eval()), tuned, atol=1e-5)
    merged = again.merge_and_unload()
    assert torch.allclose(logits(merged), tuned, atol=1e-4)
