"""What a layer gives without an expert, beside the model run with that expert masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nuteprune.gates import expert_scores
from nuteprune.gates.budget import Budget
from nuteprune.gates.expert_scores import removal_order
from nuteprune.gates.importance import METHODS
from nuteprune.gates.masks import Layout, Masks
from nuteprune.gates.scores import Probe
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from tests.families import MIXTURES

TOKENS = torch.randint(3, 96, (3, 8), generator=torch.Generator().manual_seed(0))


def masked(model: Any, hooks: MaskHooks, layout: Layout, experts: Any, gone: list[int]) -> Tensor:
    """What a layer's experts give (S, D) with some of all layers' masked."""
    masks = Masks.open(layout, ["experts"])
    masks.values["experts"][gone] = 0
    seen: list[Tensor] = []
    hook = experts.register_forward_hook(lambda _, __, y: seen.append(y))
    with hooks.using(masks):
        model(TOKENS, use_cache=False)
    hook.remove()
    output = seen[0]
    rows = TOKENS.numel()
    return output if len(output) == rows else output.view(-1, rows, output.shape[-1]).sum(0)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_go_in_the_order_that_masks_find(model_type: str, tiny_model) -> None:
    """Every set that is met on the way is masked, and the layer run with it."""
    model = tiny_model(model_type)
    anatomy = Anatomy(model)
    hooks, budget = MaskHooks(anatomy), Budget.of(anatomy)
    it = Probe(anatomy, hooks, budget, ("experts",), plain_batches=[TOKENS])
    sizes = [x for x in it.layout.sizes["experts"] if x]
    ours = removal_order(it).split(sizes)
    mixture = next(x for x in map(anatomy.mixture, range(3)) if x is not None)

    def loss(gone: list[int]) -> float:
        output = masked(model, hooks, it.layout, mixture.experts, gone)
        return float((output - dense).square().sum())

    # Of the first layer with experts: whatever is masked there, it reads what it read.
    dense, gone = masked(model, hooks, it.layout, mixture.experts, []), list[int]()
    while len(gone) < 6 - mixture.per_token:
        losses = {e: loss([*gone, e]) for e in range(6) if e not in gone}
        if min(losses.values()) > 1e-6:  # else several are worth nothing, in any order
            assert int(ours[0].argsort()[len(gone)]) == min(losses, key=losses.__getitem__)
        gone.append(int(ours[0].argsort()[len(gone)]))
    assert [sorted(x.tolist()) for x in ours] == [list(range(6))] * len(sizes)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_one_round_takes_the_cheapest_of_all(
    model_type: str, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = probe(tiny_model(model_type))
    one_by_one = removal_order(it)
    monkeypatch.setattr(expert_scores, "ROUNDS", 1)
    at_once = removal_order(it)
    assert torch.equal(at_once.view(-1, 6).argmin(1), one_by_one.view(-1, 6).argmin(1))
    assert not torch.equal(at_once, one_by_one)


def probe(model: Any) -> Probe:
    anatomy = Anatomy(model.requires_grad_(False))
    budget = Budget.of(anatomy)
    return Probe(anatomy, MaskHooks(anatomy), budget, ("experts",), [TOKENS], [TOKENS])


@pytest.mark.parametrize("first", [1, 4])
def test_the_last_of_two_that_do_the_same_stays(first: int, tiny_model) -> None:
    """One of them costs nothing and goes first; the other then stands in for both."""
    model = tiny_model("mixtral", num_experts_per_tok=1)
    it, other = probe(model), 5 - first
    mixture = it.anatomy.mixture(0)
    for stack in (*mixture.experts.parameters(), mixture.router.weight):
        stack.data[other] = stack.data[first]
    mixture.router.weight.data[first] *= 1.001  # so that tokens go to it alone
    mixture.router.weight.data[[1, 4]] *= 4
    place_E = removal_order(it)[:6]
    assert float(place_E[[1, 4]].min()) == 0
    assert float(place_E[[1, 4]].max()) > 2
    scores = METHODS["reconstruction"].score(it)["experts"][:6]
    assert torch.equal(scores.argsort(), place_E.argsort())
