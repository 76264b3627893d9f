"""For every family, kind of gate and kind of shape: masked = folded = sliced = saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nuteprune.errors import UserError
from nuteprune.export.checkpoint import assemble, recount, save
from nuteprune.export.loading import load_pruned
from nuteprune.export.record import blocks_recount
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import GATE_KINDS
from nuteprune.model.hooks import MaskHooks
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.constraints import make_allocator
from tests.families import MORE, QUICK, dense, each_family
from tests.greedy import continuation

KINDS = (
    "heads",
    "kv_groups",
    "kv_groups,heads",
    "neurons",
    "hidden",
    "attn_block",
    "mlp_block",
    "heads,neurons,hidden",
    "kv_groups,heads,neurons,hidden,attn_block,mlp_block",
)


def settings(kinds: str, shapes: str) -> NutePruneConfig:
    return NutePruneConfig(
        output_dir="unused", gates=kinds, shapes=shapes, neuron_multiple=8, hidden_multiple=8
    )


def soft_masks(allocator: Allocator, share: float) -> tuple[Masks, float]:
    """Exportable masks that remove a share of what can be removed, with soft values where open."""
    random = torch.Generator().manual_seed(0)
    kinds = allocator.constraints.kinds
    scores = {k: torch.rand(allocator.layout.units(k), generator=random) for k in kinds}
    shape = allocator.shape(scores, share * allocator.maximum())
    hard = allocator.masks(shape, scores)
    values = {k: v * (0.5 + torch.rand(v.shape, generator=random)) for k, v in hard.values.items()}
    return Masks(allocator.layout, values), allocator.budget.sparsity(shape)


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens, use_cache=False).logits


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("shapes", ["free", "uniform"])
@pytest.mark.parametrize("kinds", KINDS)
@each_family
def test_masked_folded_sliced_and_saved_models_agree(
    model_type: str, kinds: str, shapes: str, tiny_model, tmp_path: Path
) -> None:
    check(model_type, kinds, shapes, tiny_model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["free", "uniform"])
@pytest.mark.parametrize("model_type", [x for x in dense() if x not in (*QUICK, *MORE)])
def test_all_kinds_that_are_taken_agree_together(
    model_type: str, shapes: str, tiny_model, tmp_path: Path
) -> None:
    refusal = FAMILIES[model_type].refusal
    taken = [x for x in GATE_KINDS if not refusal(x, uniform=shapes == "uniform")]
    check(model_type, ",".join(taken), shapes, tiny_model, tmp_path)


def check(model_type: str, kinds: str, shapes: str, tiny_model, tmp_path: Path) -> None:
    family = FAMILIES[model_type]
    model = tiny_model(model_type)
    anatomy = Anatomy(model)
    asked = kinds.split(",")
    refused = [k for k in asked if family.refusal(k, uniform=shapes == "uniform")]
    if refused:
        with pytest.raises(UserError, match="cannot be used here"):
            make_allocator(anatomy, settings(kinds, shapes))
        return
    allocator = make_allocator(anatomy, settings(kinds, shapes))
    masks, sparsity = soft_masks(allocator, 0.5)
    assert sparsity > 0
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    hooks = MaskHooks(anatomy)
    with hooks.using(masks):
        masked = logits(model, tokens)
    hooks.remove()
    assert not torch.allclose(masked, logits(model, tokens))

    small, shape = assemble(anatomy, masks)
    assert_same(logits(small, tokens), masked)
    save(small, tmp_path / "out")
    loaded = load_pruned(tmp_path / "out", dtype=torch.float32)
    assert_same(logits(loaded, tokens), masked)
    assert Anatomy(loaded).shape == shape

    counted = blocks_recount(recount(tmp_path / "out")["tensors"], loaded.config.model_type)
    assert counted == allocator.budget.parameters(shape)
    assert 1 - counted / allocator.budget.before == pytest.approx(sparsity, abs=1e-12)
    assert recount(tmp_path / "out")["total"] == sum(p.numel() for p in loaded.parameters())
    if shapes == "uniform":
        assert type(loaded).__module__.startswith("transformers.models.")

    cached, plain = (continuation(loaded, tokens, 5, use_cache=x) for x in (True, False))
    assert torch.equal(cached, plain)


def test_folding_alone_gives_the_masked_model(tiny_model) -> None:
    from nuteprune.shrink.finalize import fold_layer, fold_outside

    model = tiny_model("llama")
    anatomy = Anatomy(model)
    allocator = make_allocator(anatomy, settings("kv_groups,neurons,hidden", "free"))
    masks, _ = soft_masks(allocator, 0.5)
    tokens = torch.arange(3, 12)[None]
    with (hooks := MaskHooks(anatomy)).using(masks):
        masked = logits(model, tokens)
    hooks.remove()
    for layer in range(len(anatomy.layers)):
        fold_layer(anatomy, masks, layer)
    fold_outside(anatomy, masks)
    assert_same(logits(model, tokens), masked)


def test_a_pruned_model_can_be_pruned_again(tiny_model, tmp_path: Path) -> None:
    first = Anatomy(tiny_model("llama"))
    masks, _ = soft_masks(make_allocator(first, settings("kv_groups,neurons", "free")), 0.3)
    small, _ = assemble(first, masks)
    again = Anatomy(small)
    allocator = make_allocator(again, settings("kv_groups,neurons", "free"))
    masks, _ = soft_masks(allocator, 0.5)
    tokens = torch.arange(3, 12)[None]
    with (hooks := MaskHooks(again)).using(masks):
        masked = logits(small, tokens)
    hooks.remove()
    smaller, shape = assemble(again, masks)
    assert_same(logits(smaller, tokens), masked)
    assert allocator.budget.parameters(shape) < allocator.budget.before
