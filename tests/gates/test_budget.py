from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

from nuteprune.gates.budget import Budget
from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from nuteprune.model.shape import LayerShape, Shape
from tests.families import DENSE_KINDS

SMALL, HIDDEN = LayerShape(2, 1, 20), 16


def smaller(tiny_model, name: str):
    """A stock model with two heads of eight, one group, 20 neurons and a width of 16."""
    family = Anatomy(tiny_model(name)).family
    names = family.config_names
    sizes = {names["hidden"]: HIDDEN, names["heads"]: 2, names["neurons"]: 20}
    if "kv_heads" in names:
        sizes["num_key_value_heads"] = 2 if name == "llama_mha" else 1
    if name == "opt":
        sizes["word_embed_proj_dim"] = HIDDEN
    return tiny_model(name, **sizes)


def counted(model) -> tuple[int, int]:
    """Parameters of the first layer's attention and MLP, norms and activations left out."""
    first = Anatomy(model).layers[0]
    named = [(n, p.numel()) for n, p in first.named_parameters() if not re.search("norm|act", n)]
    attention = sum(size for name, size in named if re.search("attn|attention", name))
    return attention, sum(size for _, size in named) - attention


def test_a_shape_costs_what_a_stock_model_of_that_shape_has(tiny_model, plain_name: str) -> None:
    budget = Budget.of(Anatomy(tiny_model(plain_name)))
    model = smaller(tiny_model, plain_name)
    small = Anatomy(model).shape
    attention, mlp = counted(model)
    assert budget.before == 3 * sum(counted(tiny_model(plain_name)))
    assert budget.parameters(small) == 3 * (attention + mlp)
    layer = small.layers[0]
    no_attention, no_mlp = LayerShape(0, 0, 20), LayerShape(layer.heads, layer.kv_heads, 0)
    mixed = Shape(HIDDEN, (layer, no_attention, no_mlp))
    assert budget.parameters(mixed) == 2 * (attention + mlp)
    assert budget.sparsity(mixed) == pytest.approx(1 - 2 * (attention + mlp) / budget.before)
    assert budget.sparsity(budget.shape) == 0


CASES = {
    "llama": ("llama", LayerShape(4, 2, 2), ()),
    "multi-head": ("llama", LayerShape(3, 3, 3), ()),
    "biased": ("qwen2", LayerShape(4, 2, 2), ("q_proj", "k_proj", "v_proj")),
    "fused": ("phi3", LayerShape(4, 2, 2), ()),
    "interleaved": ("gpt_neox", LayerShape(3, 3, 3), ("query_key_value", "dense", "4h_to_h")),
    "opt": ("opt", LayerShape(3, 3, 3), ("proj", "fc1", "fc2")),
}


def case(name: str) -> tuple[Budget, tuple[str, ...]]:
    model_type, layer, biased = CASES[name]
    family = FAMILIES[model_type]
    biases = {p.path: p.path.endswith(biased) if biased else False for p in family.projections}
    kinds = tuple(k for k in DENSE_KINDS if k != "kv_groups" or layer.heads_per_group > 1)
    return Budget(family, Shape(2, (layer,)), 2, biases), kinds


def entries_kept(budget: Budget, keep: dict[str, Tensor]) -> Tensor:
    """Entries of weights and biases (M,) of one layer whose row and column stay, for 0/1 masks."""
    layer, family = budget.shape.layers[0], budget.family
    heads = keep["heads"]
    if "kv_groups" in keep:
        heads = heads * keep["kv_groups"].repeat_interleave(layer.heads_per_group, 1)
    q = heads.repeat_interleave(2, 1)
    units = {
        "hidden": keep["hidden"],
        "neurons": keep["neurons"],
        "q": q,
        "kv": keep["kv_groups"].repeat_interleave(2, 1) if "kv_groups" in keep else q,
        "qkv": heads.repeat_interleave(6, 1),
    }
    total = torch.zeros(len(q))
    for block, projections in (("attn_block", family.attention), ("mlp_block", family.mlp)):
        for projection in projections:
            rows = torch.cat([units[axis] for axis in projection.rows], 1)
            entries = torch.einsum("mr,mc->m", rows, units[projection.columns])
            entries += rows.sum(1) * budget.biases[projection.path]
            total += entries * keep[block][:, 0]
    return total


@pytest.mark.parametrize("name", CASES)
def test_expected_sparsity_is_the_mean_over_all_masks(name: str) -> None:
    budget, kinds = case(name)
    layout = Layout(budget.shape, budget.head_dim)
    sizes = [layout.units(kind) for kind in kinds]
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=sum(sizes))))
    probability = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    chance = torch.where(every > 0, probability, 1 - probability).prod(1)
    assert chance.sum() == pytest.approx(1)
    kept = entries_kept(budget, dict(zip(kinds, every.split(sizes, 1), strict=True)))
    assert kept.max() == budget.before
    expected = 1 - (chance * kept).sum() / budget.before
    keep = Masks(layout, dict(zip(kinds, probability.split(sizes), strict=True)))
    assert budget.expected_sparsity(keep) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_expected_sparsity_are_finite_differences(name: str) -> None:
    budget, kinds = case(name)
    layout = Layout(budget.shape, budget.head_dim)
    random = torch.Generator().manual_seed(1)
    leaves = [
        torch.rand(layout.units(k), generator=random, dtype=torch.float64).requires_grad_()
        for k in kinds
    ]

    def sparsity(*values: Tensor) -> Tensor:
        return budget.expected_sparsity(Masks(layout, dict(zip(kinds, values, strict=True))))

    assert torch.autograd.gradcheck(sparsity, leaves)


def test_layers_without_experts_count_none(tiny_model) -> None:
    anatomy = Anatomy(tiny_model("glm4_moe"))
    budget = Budget.of(anatomy)
    assert [x.experts for x in budget.shape.layers] == [0, 6, 6]
    layout = Layout(budget.shape, budget.head_dim)
    masks = Masks.open(layout, ["experts", "expert_neurons"])
    assert budget.expected_sparsity(masks) == pytest.approx(0, abs=1e-6)
    masks.values["experts"][0] = 0
    gone = budget.shape.cut_to({"layers": [{}, {"experts": 5}, {}]})
    assert budget.expected_sparsity(masks) == pytest.approx(budget.sparsity(gone), rel=1e-4)


def test_hard_masks_have_the_sparsity_of_their_shape(tiny_model, plain_name: str) -> None:
    """Layer 0 keeps one head and 13 neurons, layer 1 no attention, layer 2 no MLP."""
    anatomy = Anatomy(tiny_model(plain_name))
    budget, layout = Budget.of(anatomy), Layout(anatomy.shape, anatomy.head_dim)
    keep = {kind: torch.ones(layout.units(kind)) for kind in DENSE_KINDS}
    keep["attn_block"][1] = keep["mlp_block"][2] = 0
    keep["neurons"][5:40] = 0
    keep["hidden"][10:] = 0
    whole = anatomy.shape.layers[0]
    if whole.heads_per_group > 1:
        keep["kv_groups"][0] = 0
    else:
        del keep["kv_groups"]
    keep["heads"][[0, 1, 2]] = 0
    layers = (
        LayerShape(1, 1, 13),
        LayerShape(0, 0, 48),
        LayerShape(whole.heads, whole.kv_heads, 0),
    )
    expected = budget.sparsity(Shape(10, layers))
    assert budget.expected_sparsity(Masks(layout, keep)) == pytest.approx(expected, abs=1e-6)
