from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from nuteprune.errors import UserError
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Family
from nuteprune.model.shape import LayerShape, Shape
from nuteprune.model.trainable import add_lora

UNGROUPED = ("llama_mha", "gpt_neox", "opt")
BETWEEN_MIXERS = ("qwen3_5_text", "lfm2", "granitemoehybrid")
"""The second of three layers has attention, the others have a mixer."""
QUERIES_AND_VALUES = {
    "phi3": {"self_attn.qkv_proj"},
    "gpt_neox": {"attention.query_key_value"},
}


def adapted(model, queries_and_values: bool = False):
    return add_lora(Anatomy(model), queries_and_values, r=2)


def test_dimensions_and_counts_are_the_models_own_with_and_without_lora(
    tiny_model, tiny_name: str
) -> None:
    model = tiny_model(tiny_name)
    layer = LayerShape(4, 4 if tiny_name in UNGROUPED else 2, 48)
    if tiny_name == "falcon_h1":
        layer = replace(layer, mixer=True)
    outer = LayerShape(0, 0, 48, mixer=True) if tiny_name in BETWEEN_MIXERS else layer
    expected = Shape(32, (outer, layer, outer))
    parameters = sum(p.numel() for p in model.parameters())
    biases = {n.partition("layers.0.")[2] for n, _ in model.named_parameters() if "bias" in n}

    def check(anatomy: Anatomy) -> None:
        assert anatomy.shape == expected
        assert anatomy.head_dim == 8
        assert anatomy.parameters() == parameters
        assert anatomy.tied == model.config.tie_word_embeddings
        assert anatomy.biases == {path: f"{path}.bias" in biases for path in anatomy.biases}
        assert len(anatomy.biases) == len(anatomy.family.projections)

    check(Anatomy(model))
    anatomy = Anatomy(adapted(model))
    check(anatomy)
    assert [len(anatomy.lora_layers(i)) for i in range(3)] == adapters(anatomy.family, tiny_name)


def test_a_head_dim_that_the_stock_class_does_not_read_is_not_read_here(tiny_model) -> None:
    model = tiny_model("gpt_neox", head_dim=4)
    assert model.config.head_dim == 4
    heads, output = model.config.num_attention_heads, model.gpt_neox.layers[0].attention.dense
    assert Anatomy(model).head_dim * heads == output.in_features


def adapters(family: Family, name: str) -> list[int]:
    """LoRA layers of each layer: not on what a mixer writes by."""
    attention, mixer, mlp = len(family.attention), len(family.mixer[:-1]), len(family.mlp)
    if name in BETWEEN_MIXERS:
        return [mixer + mlp, attention + mlp, mixer + mlp]
    return [attention + mixer + mlp] * 3


def test_lora_on_queries_and_values_alone(tiny_model, tiny_name: str) -> None:
    model = adapted(tiny_model(tiny_name), queries_and_values=True)
    found = {n.partition(".lora_A.")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    expected = QUERIES_AND_VALUES.get(tiny_name, {"self_attn.q_proj", "self_attn.v_proj"})
    assert {n.partition("layers.")[2] for n in found} == {
        f"{layer}.{path}"
        for layer in ([1] if tiny_name in BETWEEN_MIXERS else range(3))
        for path in expected
    }


def test_norms_are_all_of_those_over_the_width(tiny_model, tiny_name: str) -> None:
    anatomy = Anatomy(tiny_model(tiny_name))
    for layer in range(3):
        wide = {m for n, m in anatomy.layers[layer].named_children() if "norm" in n}
        assert set(anatomy.norms(layer)) == wide
        assert {p.shape for m in wide for p in m.parameters()} <= {(32,)}
    assert {p.shape for p in anatomy.final_norm.parameters()} <= {(32,)}


def test_a_variant_that_the_entry_does_not_describe_is_refused(tiny_model) -> None:
    with pytest.raises(UserError, match="do_layer_norm_before=False are not supported"):
        Anatomy(tiny_model("opt", do_layer_norm_before=False))


def test_lora_goes_around_blocks_that_are_gone(tiny_model, tiny_name: str) -> None:
    model = tiny_model(tiny_name)
    family = Anatomy(model).family
    layer = model.get_submodule(family.layers)[1]
    for name in family.mlp_modules:
        setattr(layer, name, nn.Identity())
    anatomy = Anatomy(adapted(model))
    counts = [len(anatomy.lora_layers(i)) for i in range(3)]
    first, second, third = adapters(family, tiny_name)
    assert counts == [first, second - len(family.mlp), third]
