"""Pruned checkpoints in vLLM: greedy tokens and their log-probabilities as in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nuteprune.export.checkpoint import save

pytestmark = pytest.mark.clients

SIZES = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 192, "vocab_size": 128}
PROMPT, STEPS = [40, 5, 77, 120, 9, 33, 25, 61, 14, 108, 99, 3], 8


@pytest.mark.parametrize(
    ("name", "gates", "shapes"),
    [
        ("llama", ("kv_groups", "heads", "neurons"), "free"),
        ("llama", ("kv_groups", "neurons"), "uniform"),
        ("llama", ("mlp_block",), "free"),
        ("mistral", ("kv_groups", "heads", "neurons"), "free"),
        ("qwen2", ("kv_groups", "heads", "neurons"), "free"),
        ("qwen3", ("kv_groups", "heads", "neurons"), "free"),
        ("phi3", ("kv_groups", "heads", "neurons"), "free"),
        ("llama", ("kv_groups", "heads", "neurons", "hidden"), "free"),
        ("gemma2", ("kv_groups", "heads", "neurons"), "free"),
        ("gemma3_text", ("kv_groups", "heads", "neurons"), "free"),
        ("granite", ("kv_groups", "heads", "neurons"), "free"),
        ("gpt_neox", ("heads", "neurons"), "free"),
        ("opt", ("heads", "neurons"), "free"),
    ],
)
def test_greedy_tokens(
    name: str,
    gates: tuple[str, ...],
    shapes: str,
    tiny_model: Callable,
    prune_at_random: Callable,
    start: Callable,
    tmp_path: Path,
) -> None:
    model = prune_at_random(tiny_model(name, **SIZES), gates, shapes)
    save(model, tmp_path / "model")
    tokens = torch.tensor([PROMPT])
    made = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
    )
    with torch.no_grad():
        scores = model(made).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    chosen = made[0, len(PROMPT) :]
    answer = start("vllm", "vllm_client.py").ask(
        folder=str(tmp_path / "model"),
        remote_code=shapes == "free",
        implementation="transformers" if shapes == "free" else "auto",
        prompt=PROMPT,
        steps=STEPS,
    )
    assert answer["made"] == chosen.tolist()
    expected = scores.gather(-1, chosen[:, None])[:, 0]
    assert torch.allclose(torch.tensor(answer["logprobs"]), expected, atol=1e-3)
