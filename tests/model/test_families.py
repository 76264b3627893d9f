from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from nuteprune.errors import UserError
from nuteprune.model.families import FAMILIES, family_named


def test_an_unknown_type_is_refused_with_the_supported_ones_and_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        family_named("lama")
    assert "'lama' is not supported" in str(error.value)
    assert "nearest: llama)" in str(error.value)
    for model_type in FAMILIES:
        assert model_type in str(error.value)
    with pytest.raises(UserError) as error:
        family_named("xyz")
    assert "nearest" not in str(error.value)


def test_a_pruned_checkpoint_is_of_its_stock_family() -> None:
    assert family_named("pruned_gemma2") is FAMILIES["gemma2"]


def test_what_a_family_cannot_take_is_refused_with_the_reason() -> None:
    for kind in ("hidden", "heads", "neurons", "attn_block"):
        refused = {name for name, family in FAMILIES.items() if family.refusal(kind)}
        assert refused == ({"gpt_neox", "opt"} if kind == "hidden" else set())
    reason = FAMILIES["opt"].refusal("hidden")
    assert reason is not None
    assert "LayerNorm" in reason
    assert all(family.refusal("mlp_block", uniform=True) for family in FAMILIES.values())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_heads_need_to_divide_the_width_where_the_stock_config_says_so(model_type: str) -> None:
    family = FAMILIES[model_type]
    names = family.config_names
    sizes = {names["hidden"]: 32, names["heads"]: 3, names["neurons"]: 48}
    grouped = {"num_key_value_heads": 3, "head_dim": 8} if "kv_heads" in names else {}

    def build() -> None:
        config = CONFIG_MAPPING[model_type](
            **sizes | grouped, vocab_size=96, num_hidden_layers=1, pad_token_id=0
        )
        AutoModelForCausalLM.from_config(config)

    if family.heads_divide_hidden:
        with pytest.raises(Exception, match=r"multiple of|divisible"):
            build()
    else:
        build()
