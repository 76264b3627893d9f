"""What is read off small models of the listed families is what their entries say."""

from __future__ import annotations

from dataclasses import fields

import pytest
from transformers import CONFIG_MAPPING

from nuteprune.errors import UserError
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import Family
from nuteprune.model.proposal import propose
from nuteprune.model.small import SIZES, config_named, small_config, small_model
from tests.families import each_plain_family

NOT_SEEN = {
    *("gguf", "rope_names", "requires", "vllm_head_dim_from_hidden", "multipliers", "buffers"),
    *("vllm_backend", "attention_softcap", "activation", "counts_heads", "attention"),
    *("rope_pairs", "attention_clip"),
}
"""Facts about other programs, of variants, or that only trying tells; `attention` is compared
without its order."""
CONFIGS = {
    "gemma3_text": {"final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 4.0},
    "opt": {"do_layer_norm_before": True},
}
"""What a config must state for a fact to show."""


def facts(family: Family) -> dict[str, object]:
    found = {x.name: getattr(family, x.name) for x in fields(family) if x.name not in NOT_SEEN}
    return found | {"attention": set(family.attention), "writer": family.attention[-1]}


@each_plain_family
def test_the_entry_of_a_listed_family_is_found_again(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](**CONFIGS.get(model_type, {}))
    assert facts(FAMILIES[model_type]) in [facts(x) for x in propose(config)]


def test_a_small_model_is_small_whatever_the_config() -> None:
    config = config_named("llama")
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
    small = small_config(config, neurons=40)
    assert (small.hidden_size, small.intermediate_size) == (SIZES["hidden"], 40)
    assert small.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert sum(p.numel() for p in small_model(small).parameters()) < 200_000
    assert config.hidden_size == 4096


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt2", "0 lists of layers with linear modules"),
        ("bert", "the norm output.LayerNorm neither feeds one of the blocks nor follows one"),
        ("bloom", "has no layers of one attention and one MLP block"),
        ("blt", "would still have 4,632,992,512 parameters"),
        ("rwkv", "states no number of attention heads"),
        ("no_such_type", "transformers knows no model type 'no_such_type'"),
    ],
)
def test_what_no_entry_can_describe_is_refused_with_the_reason(
    model_type: str, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        propose(config_named(model_type))
