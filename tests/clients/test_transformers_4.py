"""Pruned checkpoints in transformers 4.57: free by remote code, uniform as the stock class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nuteprune.export.checkpoint import save
from nuteprune.model.families import FAMILIES

pytestmark = pytest.mark.clients

PROMPT, STEPS = [40, 5, 77, 12, 9, 33, 25, 61, 14, 8, 90, 3], 8


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt_neox"])
def test_greedy_tokens(
    name: str,
    tiny_model: Callable,
    prune_at_random: Callable,
    start: Callable,
    tmp_path: Path,
) -> None:
    client = start("transformers-4", "transformers_client.py")
    tokens = torch.tensor([PROMPT])
    for shapes in ("free", "uniform"):
        rope = {"rope_theta": 5e3}
        if name == "gpt_neox":
            rope["partial_rotary_factor"] = 0.5
        gates = ("neurons",) if name == "gpt_neox" else ("kv_groups", "neurons")
        model = prune_at_random(tiny_model(name, rope_parameters=rope), gates, shapes)
        save(model, tmp_path / shapes)
        made = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
        )
        answer = client.ask(
            folder=str(tmp_path / shapes),
            remote_code=shapes == "free",
            prompt=PROMPT,
            steps=STEPS,
        )
        assert answer["version"].startswith("4.57.")
        stock = FAMILIES[name].causal_lm
        assert answer["class"] == (f"Pruned{stock}" if shapes == "free" else stock)
        assert answer["made"] == made[0, len(PROMPT) :].tolist()
