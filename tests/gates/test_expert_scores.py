"""Scores of routed experts beside a naive loop: expert by expert, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nuteprune.errors import UserError
from nuteprune.gates.budget import Budget, unit_parameters
from nuteprune.gates.expert_scores import hearing_experts
from nuteprune.gates.importance import METHODS, check_scorable
from nuteprune.gates.masks import Masks
from nuteprune.gates.scores import Probe, losses_of, ranks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from tests.families import MIXTURES

TOKENS = torch.randint(3, 96, (3, 8), generator=torch.Generator().manual_seed(0))
BATCHES = [TOKENS[:2], TOKENS[2:]]


def probe(model: Any, *kinds: str) -> Probe:
    anatomy = Anatomy(model.requires_grad_(False))
    return Probe(anatomy, MaskHooks(anatomy), Budget.of(anatomy), kinds, BATCHES, BATCHES)


def told(model: Any, anatomy: Anatomy, layer: int) -> tuple[Tensor, Tensor]:
    """By hand, of a layer of Mixtral: tokens of each expert (E,), and its mean of weight x norm."""
    mixture, seen = anatomy.mixture(layer), []
    assert mixture is not None
    hook = mixture.router.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        for row in TOKENS:
            model(row[None], use_cache=False)
    hook.remove()
    count, loud = torch.zeros(6), torch.zeros(6)
    for x in torch.cat(seen):
        best = (mixture.router.weight @ x).softmax(0).topk(2)
        for weight, e in zip(best.values / best.values.sum(), best.indices, strict=True):
            gate, up = (mixture.experts.gate_up_proj[e] @ x).split(24)
            count[e] += 1
            loud[e] += weight * (mixture.experts.down_proj[e] @ (F.silu(gate) * up)).norm()
    return count, loud / count.clamp(min=1)


def test_reap_is_what_a_loop_finds(tiny_model) -> None:
    model = tiny_model("mixtral")
    it = probe(model, "experts")
    with hearing_experts(it.anatomy) as heard:
        it.read()
    by_hand = [told(model, it.anatomy, i) for i in range(3)]
    for layer, (count, loud) in zip(heard, by_hand, strict=True):
        assert torch.equal(layer.tokens_E.float(), count)
        torch.testing.assert_close(layer.reap(), loud)
    placed = ranks(it.layout, "experts", torch.cat([loud for _, loud in by_hand]))
    expected = losses_of(it.budget, {"experts": placed})["experts"]
    torch.testing.assert_close(METHODS["reap"].score(it)["experts"], expected)


@torch.no_grad()
def test_experts_that_read_weighed_tokens_are_heard_as_they_are(tiny_model) -> None:
    """Llama 4's weights are on what its experts read, so a loud one is loud after them."""
    it, seen = probe(tiny_model("llama4_text"), "experts"), []
    mixture = it.anatomy.mixture(2)
    assert mixture is not None
    hook = mixture.router.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with hearing_experts(it.anatomy) as heard:
        it.read()
    hook.remove()
    count, loud = torch.zeros(6), torch.zeros(6)
    for x in torch.cat(seen):
        scores = mixture.router.weight @ x
        best = int(scores.argmax())
        gate, up = (scores[best].sigmoid() * x @ mixture.experts.gate_up_proj[best]).split(24)
        count[best] += 1
        loud[best] += (F.silu(gate) * up @ mixture.experts.down_proj[best]).norm()
    assert len(heard) == 2
    assert torch.equal(heard[1].tokens_E.float(), count)
    torch.testing.assert_close(heard[1].reap(), loud / count.clamp(min=1))


@pytest.mark.parametrize("name", [x for x in METHODS if "experts" in METHODS[x].kinds])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_scores_of_experts_are_losses(name: str, model_type: str, tiny_model) -> None:
    it = probe(tiny_model(model_type), "experts")
    scores = METHODS[name].score(it)["experts"]
    assert scores.shape == (18,)
    assert bool((scores >= 0).all())
    assert bool(scores.isfinite().all())
    assert scores.unique().numel() > 1


def test_fisher_is_the_squared_gradient_of_what_an_expert_adds(tiny_model) -> None:
    """Against finite differences of the loss by one expert's mask, and one neuron's."""
    it = probe(tiny_model("qwen3_moe"), "experts", "expert_neurons")
    fisher = METHODS["fisher"].score(it)
    for kind in it.kinds:
        unit = int(fisher[kind].argmax())
        squares = [_slope(it, kind, unit, row[None]) ** 2 for row in TOKENS]
        assert float(fisher[kind][unit]) == pytest.approx(sum(squares) / 3, rel=0.02)


@torch.no_grad()
def _slope(it: Probe, kind: str, unit: int, ids_BT: Tensor) -> float:
    losses = []
    for value in (1.02, 0.98):
        masks = Masks.open(it.layout, [kind])
        masks.values[kind][unit] = value
        with it.hooks.using(masks):
            losses.append(float(it.anatomy.model(ids_BT, labels=ids_BT, use_cache=False).loss))
    return (losses[0] - losses[1]) / 0.04


def test_the_default_has_the_order_of_a_reconstruction_and_the_sizes_of_fisher(tiny_model) -> None:
    it = probe(tiny_model("qwen3_moe"), "experts", "kv_groups")
    ours = METHODS["surgeon"].score(it)["experts"].split([6, 6])
    alone = probe(it.anatomy.model, "experts")
    order, sizes = (
        METHODS[x].score(alone)["experts"].split([6, 6]) for x in ("reconstruction", "fisher")
    )
    for mine, first, size in zip(ours, order, sizes, strict=True):
        assert torch.equal(mine.argsort(), first.argsort())
        torch.testing.assert_close(mine.sort().values, size.sort().values)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_an_expert_takes_along_what_a_smaller_model_lacks(model_type: str, tiny_model) -> None:
    budget = Budget.of(Anatomy(tiny_model(model_type)))
    names = budget.family.config_names
    fewer = Budget.of(Anatomy(tiny_model(model_type, **{names["experts"]: 5})))
    mixtures = sum(x.experts > 0 for x in budget.shape.layers)
    each = unit_parameters(budget, "experts")
    assert (budget.before - fewer.before) / mixtures == each[0] == each[-1]
    thin = Budget.of(Anatomy(tiny_model(model_type, **{names["expert_neurons"]: 23})))
    shared = {"": 0, "n_shared_experts": 2, 1: 1}[budget.family.experts.shared_times]
    one = unit_parameters(budget, "expert_neurons")
    assert (budget.before - thin.before) / mixtures / (6 + shared) == one[0] == one[-1]


def test_kinds_that_scores_of_experts_do_not_know_are_refused() -> None:
    with pytest.raises(UserError, match="reap cannot score gates on heads: it judges whole routed"):
        check_scorable("reap", ("experts", "heads"))
