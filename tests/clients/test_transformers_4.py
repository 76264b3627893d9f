"""Pruned checkpoints in transformers 4: free by remote code, uniform as the stock class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune.export.checkpoint import save
from nuteprune.model.families import FAMILIES
from tests.greedy import continuation

pytestmark = pytest.mark.clients

PROMPT, STEPS = [40, 5, 77, 12, 9, 33, 25, 61, 14, 8, 90, 3], 8
TEXT = "café 1234 the student learns\n  def f(x): return 2"


@pytest.mark.parametrize(
    ("version", "name"),
    [
        *(("4.57", name) for name in ("llama", "qwen2", "qwen3", "gpt_neox")),
        *(("4.43", name) for name in ("llama", "qwen2", "gpt_neox")),  # it knows no qwen3
    ],
)
def test_greedy_tokens(
    version: str,
    name: str,
    tiny_model: Callable,
    tiny_tokenizer: Any,
    prune_at_random: Callable,
    start: Callable,
    tmp_path: Path,
) -> None:
    client = start(f"transformers-{version}", "transformers_client.py")
    tokens = torch.tensor([PROMPT])
    for shapes in ("free", "uniform"):
        rope = {"rope_theta": 5e3}
        if name == "gpt_neox":
            rope["partial_rotary_factor"] = 0.5
        # Up to 4.44 the stock classes divide the width by the heads to tell the size of a head.
        neurons_alone = name == "gpt_neox" or version == "4.43"
        gates = ("neurons",) if neurons_alone else ("kv_groups", "neurons")
        model = prune_at_random(tiny_model(name, rope_parameters=rope), gates, shapes)
        save(model, tmp_path / shapes, tiny_tokenizer)
        made = continuation(model, tokens, STEPS)
        answer = client.ask(
            folder=str(tmp_path / shapes),
            remote_code=shapes == "free",
            prompt=PROMPT,
            steps=STEPS,
            text=TEXT,
        )
        assert answer["version"].startswith(f"{version}.")
        assert answer["tokens"] == tiny_tokenizer(TEXT).input_ids
        stock = FAMILIES[name].causal_lm
        assert answer["class"] == (f"Pruned{stock}" if shapes == "free" else stock)
        assert answer["made"] == made[0].tolist()
