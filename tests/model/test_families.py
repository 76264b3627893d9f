from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from nuteprune.errors import UserError
from nuteprune.model.families import FAMILIES
from nuteprune.model.lookup import (
    family_named,
    is_encoder,
    language_model_within,
    parts_without_gates,
)
from tests.families import DENSE_KINDS, HYBRIDS, MIXTURES, dense

DENSE = dense()


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


MOE, MLA, STATE = "mixture of experts", "multi-head latent attention", "state-space"


@pytest.mark.parametrize(
    ("model_type", "parts"),
    [
        ("phimoe", {MOE}),
        ("dbrx", {MOE}),
        ("minicpm3", {MLA}),
        ("deepseek_v2", {MOE, MLA}),
        ("jamba", {MOE, STATE}),
        ("mamba2", {STATE}),
        ("recurrent_gemma", {STATE}),
        ("bart", {"an encoder"}),
    ],
)
def test_a_refusal_says_what_has_no_gates(model_type: str, parts: set[str]) -> None:
    with pytest.raises(UserError) as error:
        family_named(model_type, CONFIG_MAPPING[model_type]().to_dict())
    told = str(error.value)
    assert {part for part in (MOE, MLA, STATE, "an encoder") if part in told} == parts
    assert "which no gate here can cut; supported: llama" in told
    assert "one entry of data" not in told
    assert "nearest" not in told


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        (
            "gemma3n_text",
            "embeddings that each layer reads .* keys and values of earlier ones, neu",
        ),
        ("gemma4_text", "embeddings that each layer reads besides the residual stream, which no"),
        ("nemotron_h", "state-space, recurrent or convolutional layers, which no gate here can"),
    ],
)
def test_what_is_special_about_a_type_is_named(model_type: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        family_named(model_type, CONFIG_MAPPING[model_type]().to_dict())


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra", "deberta-v2"])
def test_an_encoder_is_told_as_such(model_type: str) -> None:
    with pytest.raises(UserError, match="it is an encoder, no decoder-only language model; supp"):
        family_named(model_type, CONFIG_MAPPING[model_type]().to_dict())
    config = CONFIG_MAPPING["modernbert"](architectures=["ModernBertForMaskedLM"]).to_dict()
    assert is_encoder(config)
    assert not is_encoder(CONFIG_MAPPING["bart"]().to_dict())  # a decoder is in it too
    assert not is_encoder(CONFIG_MAPPING["bert"](is_decoder=True).to_dict())
    decoders = (*FAMILIES, "gpt2", "bloom", "mixtral", "mamba2")
    assert not [x for x in decoders if is_encoder(CONFIG_MAPPING[x]().to_dict())]


@pytest.mark.parametrize("model_type", [x for x in DENSE if x not in HYBRIDS])
def test_a_plain_decoder_has_nothing_without_gates(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]().to_dict()
    assert parts_without_gates(config) == []
    assert language_model_within(config) is None


def test_a_wrapper_of_several_modalities_names_the_language_model_in_it() -> None:
    with pytest.raises(UserError, match=r"of type gemma3_text, which is supported\. Pass a check"):
        family_named("gemma3", CONFIG_MAPPING["gemma3"]().to_dict())
    with pytest.raises(UserError, match=r"of type llama4_text, which is supported"):
        family_named("llama4", CONFIG_MAPPING["llama4"]().to_dict())
    with pytest.raises(UserError, match=r"nearest: gemma3_text\)"):
        family_named("gemma3")  # where no config is at hand


def test_a_pruned_checkpoint_is_of_its_stock_family() -> None:
    assert family_named("pruned_gemma2") is FAMILIES["gemma2"]


def test_what_a_family_cannot_take_is_refused_with_the_reason() -> None:
    means = ("gpt_neox", "opt", "starcoder2", "nemotron", "phi", "olmo", "stablelm")
    joint = {"olmo2", "olmo3"}
    narrow = {*means, "cohere", "cohere2", "granitemoehybrid"}
    expected = {"hidden": narrow, "heads": joint, "kv_groups": joint}
    for kind in DENSE_KINDS:
        refused = {name for name in DENSE if FAMILIES[name].refusal(kind)}
        assert refused == expected.get(kind, set())
    for kind in ("experts", "expert_neurons"):
        assert {x for x in FAMILIES if not FAMILIES[x].refusal(kind)} == set(MIXTURES)
    reason = FAMILIES["opt"].refusal("hidden")
    assert reason is not None
    assert "LayerNorm" in reason
    assert all(family.refusal("mlp_block", uniform=True) for family in FAMILIES.values())


@pytest.mark.parametrize("model_type", DENSE)
def test_heads_need_to_divide_the_width_where_the_stock_config_says_so(model_type: str) -> None:
    family = FAMILIES[model_type]
    names = family.config_names
    sizes = {names["hidden"]: 32, names["heads"]: 3, names["neurons"]: 48, **family.requires}
    sizes |= {"mamba_n_heads": 4} if family.mixer_module == "mamba" else {}
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
