from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.trainable import add_lora
from tests.families import DENSE_KINDS

TOKENS = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(0))
each_kind_and_all = pytest.mark.parametrize(
    "kinds", [*((kind,) for kind in DENSE_KINDS), DENSE_KINDS], ids=[*DENSE_KINDS, "all"]
)


@torch.no_grad()
def logits(model, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def layout_of(anatomy: Anatomy) -> Layout:
    return Layout(anatomy.shape, anatomy.head_dim)


def random_values(layout: Layout, kinds: tuple[str, ...], *batch: int) -> dict[str, Tensor]:
    """Multipliers of 0 (a third of them) or in [0.5, 1.5]."""
    random = torch.Generator().manual_seed(2)
    values = {}
    for kind in kinds:
        size = (*batch, layout.units(kind))
        kept = torch.rand(size, generator=random) > 1 / 3
        values[kind] = kept * (0.5 + torch.rand(size, generator=random))
    return values


@torch.no_grad()
def scaled_by_hand(model, kind: str, values: Tensor) -> None:
    """Multiply into a stock model's weights what a gate of a kind does, layer after layer."""
    family = Anatomy(model).family
    layers = model.get_submodule(family.layers)
    sizes = layout_of(Anatomy(model)).sizes[kind]
    parts = values.split(sizes) if kind != "hidden" else [values] * len(layers)
    for layer, mine in zip(layers, parts, strict=True):
        named = dict(layer.named_modules())
        attention = [named[x.path] for x in family.attention[-1:] if x.path in named]
        mixing = attention + [named[x.path] for x in family.mixer[-1:] if x.path in named]
        down = layer.get_submodule(family.mlp[-1].path)
        if kind in ("heads", "kv_groups"):
            for linear in attention:
                linear.weight *= mine.repeat_interleave(32 // len(mine))
        elif kind == "neurons":
            down.weight *= mine
        elif kind == "hidden":
            for linear in (*mixing, down):
                scale_rows(linear, values)
        elif family.post_norms:  # which scales what the block adds, by w or 1 + w
            norm = layer.get_submodule(family.post_norms[kind == "mlp_block"])
            offset = 1 if family.norm == "rms_1p" else 0
            norm.weight.copy_((offset + norm.weight) * mine - offset)
        else:
            for linear in mixing if kind == "attn_block" else [down]:
                scale_rows(linear, mine)
    if kind == "hidden":
        model.get_input_embeddings().weight *= values
        if family.model_type == "opt":
            model.model.decoder.embed_positions.weight *= values


def scale_rows(linear, values: Tensor) -> None:
    linear.weight *= values.unsqueeze(-1)
    if linear.bias is not None:
        linear.bias *= values


def test_open_gates_are_the_stock_model_bit_for_bit(tiny_model, tiny_name: str) -> None:
    model = tiny_model(tiny_name)
    stock = logits(model)
    anatomy = Anatomy(model)
    layout, hooks = layout_of(anatomy), MaskHooks(anatomy)
    assert torch.equal(logits(model), stock)
    ones = {kind: torch.ones(layout.units(kind)) for kind in DENSE_KINDS}
    for values in (ones, {k: v.expand(3, -1) for k, v in ones.items()}):
        with hooks.using(Masks(layout, values)):
            assert torch.equal(logits(model), stock)


@each_kind_and_all
def test_a_mask_does_what_scaling_the_weights_does(
    tiny_model, tiny_name: str, kinds: tuple[str, ...]
) -> None:
    model = tiny_model(tiny_name, tie_word_embeddings=False)
    reference = copy.deepcopy(model)
    anatomy = Anatomy(model)
    values = random_values(layout_of(anatomy), kinds)
    for kind, value in values.items():
        scaled_by_hand(reference, kind, value)
    with MaskHooks(anatomy).using(Masks(layout_of(anatomy), values)):
        masked = logits(model)
    torch.testing.assert_close(masked, logits(reference), atol=5e-5, rtol=1e-5)
    assert (masked - logits(model)).abs().max() > 0.01


def test_each_sequence_can_have_masks_of_its_own(tiny_model, tiny_name: str) -> None:
    model = tiny_model(tiny_name)
    anatomy = Anatomy(model)
    layout, hooks = layout_of(anatomy), MaskHooks(anatomy)
    values = random_values(layout, DENSE_KINDS, len(TOKENS))
    with hooks.using(Masks(layout, values)):
        together = logits(model)
    for i, row in enumerate(TOKENS):
        with hooks.using(Masks(layout, {k: v[i] for k, v in values.items()})):
            alone = logits(model, row[None])[0]
        torch.testing.assert_close(together[i], alone, atol=5e-5, rtol=1e-5)


def test_masks_cover_the_lora_branch(tiny_model, tiny_name: str) -> None:
    model = tiny_model(tiny_name, tie_word_embeddings=False)
    adapted = add_lora(Anatomy(model), r=2)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert not torch.allclose(logits(merged), logits(tiny_model(tiny_name)), atol=0.01)
    anatomy = Anatomy(adapted)
    values = random_values(layout_of(anatomy), DENSE_KINDS)
    with MaskHooks(anatomy).using(Masks(layout_of(anatomy), values)):
        masked = logits(adapted)
    with MaskHooks(Anatomy(merged)).using(Masks(layout_of(anatomy), values)):
        expected = logits(merged)
    size = float(expected.abs().max())
    torch.testing.assert_close(masked, expected, atol=5e-5 * max(1.0, size), rtol=1e-5)


def test_masks_are_in_use_within_the_context_alone(tiny_model) -> None:
    model = tiny_model("llama")
    stock = logits(model)
    anatomy = Anatomy(model)
    layout, hooks = layout_of(anatomy), MaskHooks(anatomy)
    first, second = (Masks(layout, {"heads": x * torch.ones(12)}) for x in (0.5, 2.0))
    with hooks.using(first):
        outer = logits(model)
        with hooks.using(second):
            assert not torch.equal(logits(model), outer)
        with pytest.raises(IndexError), hooks.using(second):
            model(input_ids=torch.tensor([[1000]]))
        assert torch.equal(logits(model), outer)
        assert not torch.equal(outer, stock)
        hooks.remove()
        assert torch.equal(logits(model), stock)
    assert hooks.masks is None


def test_what_others_put_in_a_projections_place_is_there_again_without_hooks(tiny_model) -> None:
    anatomy = Anatomy(tiny_model("llama"))
    down = anatomy.linear(0, anatomy.family.mlp[-1])
    assert down is not None
    down.forward = others = lambda x: torch.nn.Linear.forward(down, x)  # as accelerate does
    outer, inner = MaskHooks(anatomy), MaskHooks(anatomy)
    inner.remove()
    outer.remove()
    assert down.forward is others
    assert "forward" not in vars(anatomy.linear(1, anatomy.family.mlp[-1]))
