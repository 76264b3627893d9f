"""Pruned checkpoints in vLLM: greedy tokens and their log-probabilities as in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune.export.checkpoint import save
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES

pytestmark = pytest.mark.clients

SIZES = {
    **{"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    **{"intermediate_size": 192, "vocab_size": 128},
}
LESS = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
EXPERTS = {
    "qwen3_moe": {"mlp_only_layers": [], "moe_intermediate_size": 64, "num_local_experts": 8},
    "mixtral": {"intermediate_size": 64},
    "qwen2_moe": {
        **{"mlp_only_layers": [], "moe_intermediate_size": 64},
        "shared_expert_intermediate_size": 96,
    },
    "glm4_moe": {"moe_intermediate_size": 64},
    "gpt_oss": {"intermediate_size": 64, "sliding_window": 16, "head_dim": 64},
    "olmoe": {"num_key_value_heads": 8, "clip_qkv": None, "intermediate_size": 64},
}
HEADS = ("kv_groups", "heads", "neurons")
PROMPT, STEPS = [40, 5, 77, 120, 9, 33, 25, 61, 14, 108, 99, 3], 8


def own_sizes(name: str) -> dict[str, Any]:
    """The sizes that a family's config knows of."""
    if name == "opt":
        return LESS | {"ffn_dim": 192, "word_embed_proj_dim": 256}
    if name in EXPERTS:
        return SIZES | EXPERTS[name]
    return SIZES if "kv_heads" in FAMILIES[name].config_names else LESS


@pytest.mark.parametrize(
    ("name", "gates", "shapes"),
    [
        ("llama", HEADS, "free"),
        ("llama", ("kv_groups", "neurons"), "free"),
        ("llama", ("kv_groups", "neurons"), "uniform"),
        ("llama", ("mlp_block",), "free"),
        ("llama", (*HEADS, "hidden"), "free"),
        ("mistral", HEADS, "free"),
        ("qwen2", HEADS, "free"),
        ("qwen3", HEADS, "free"),
        ("phi3", HEADS, "free"),
        ("gemma2", HEADS, "free"),
        ("gemma3_text", HEADS, "free"),
        ("granite", HEADS, "free"),
        ("gpt_neox", ("heads", "neurons"), "free"),
        ("opt", ("heads", "neurons"), "free"),
        ("qwen3_moe", ("experts", "kv_groups"), "uniform"),
        ("mixtral", ("experts", "expert_neurons", "kv_groups"), "uniform"),
        ("olmoe", ("experts",), "uniform"),
        ("qwen2_moe", ("experts", "neurons"), "uniform"),
        ("glm4_moe", ("experts", "kv_groups"), "uniform"),
        ("gpt_oss", ("experts",), "uniform"),
        ("qwen3_moe", ("experts", "kv_groups"), "free"),
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
    whole = tiny_model(name, **own_sizes(name))
    # So much that neither all groups nor all heads of a group are left alike.
    model = prune_at_random(whole, gates, shapes, share=0.3 if gates == HEADS else 0.5)
    shape = Anatomy(model).shape
    assert shape.uniform == (shapes == "uniform")
    assert (shape.hidden < SIZES["hidden_size"]) == ("hidden" in gates)
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
