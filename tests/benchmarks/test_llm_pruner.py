"""LLM-Pruner's choice of units beside a second, naive implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from nuteprune.gates.allocate import Allocator
from nuteprune.gates.allowed_shapes import Constraints
from nuteprune.gates.budget import Budget
from nuteprune.gates.scores import Probe
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from tests.scripts import script

llm_pruner = script("llm_pruner")
TOKENS = torch.randint(3, 96, (3, 8), generator=torch.Generator().manual_seed(0))


def weakest_neurons(model) -> list[set[int]]:
    """The 12 of each layer's neurons of which |weight x gradient| is the least, in one sum."""
    model.requires_grad_(True)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    found = []
    for layer in model.model.layers:
        wide = [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]
        rows: list[Tensor] = [*wide, layer.mlp.down_proj.weight.T]
        grads = [*(x.grad for x in wide), layer.mlp.down_proj.weight.grad.T]
        sums = sum((x * y).abs().sum(1) for x, y in zip(rows, grads, strict=True))
        found.append(set(sums.argsort()[:12].tolist()))
    return found


def test_the_same_share_goes_from_each_layer_but_the_first_four_and_the_last_two(
    tiny_model,
) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    weakest = weakest_neurons(model)
    anatomy = Anatomy(model.requires_grad_(False))
    budget = Budget.of(anatomy)
    probe = Probe(anatomy, MaskHooks(anatomy), budget, ("neurons",), TOKENS.split(1))
    scores = llm_pruner.METHOD.score(probe)
    allocator = Allocator(budget, Constraints(("neurons",), neuron_multiple=4))
    quarter = 2 * 12 * 3 * 32 / budget.before
    shape = allocator.shape(scores, quarter)
    assert [layer.neurons for layer in shape.layers] == [48] * 4 + [36] * 2 + [48] * 2
    masks = allocator.masks(shape, scores).values["neurons"].view(8, 48)
    for i in (4, 5):
        assert set((masks[i] == 0).nonzero().flatten().tolist()) == weakest[i]
    assert not any(x.requires_grad for x in model.parameters())
