"""What neurons of experts cost, beside least squares on the tokens of each expert."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from nuteprune.gates.budget import Budget
from nuteprune.gates.importance import METHODS
from nuteprune.gates.scores import Probe
from nuteprune.gates.surgeon import SOFTER, drawn_slope, surgeon_scores
from nuteprune.gates.surgeon_costs import DAMPING
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from tests.families import MIXTURES

TOKENS = torch.randint(3, 96, (12, 8), generator=torch.Generator().manual_seed(0))
BATCHES = list(TOKENS.split(5))


def probe(model: Any, *kinds: str) -> Probe:
    anatomy = Anatomy(model.requires_grad_(False))
    return Probe(anatomy, MaskHooks(anatomy), Budget.of(anatomy), kinds, BATCHES, BATCHES, 0)


def silu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return gate * gate.sigmoid() * up


def clamped(rows: Tensor) -> Tensor:
    gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(-7.0, 7.0)
    return gate * (1.702 * gate).sigmoid() * (up + 1)


def by_hand(model: Any, it: Probe, layer: int) -> tuple[list[Tensor], ...]:
    """Of each expert and its tokens: neurons, weights (P,), changes of the loss, which tokens (P,).

    Neurons and the changes of the loss without them are (P, F).
    """
    experts, act = it.anatomy.mixture(layer).experts, silu
    if model.config.model_type == "gpt_oss":
        act = clamped
    found: list[list[tuple[Tensor, Tensor, int]]] = [[] for _ in range(6)]
    tokens = itertools.count()

    def forward(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        rows = []
        for x, chosen, weights in zip(hidden, index, weight, strict=True):
            total: Any = 0
            token = next(tokens)
            for e, g in zip(chosen.tolist(), weights, strict=True):
                up, down = experts.gate_up_proj[e], experts.down_proj[e]
                if act is clamped:
                    inner = act(x @ up + experts.gate_up_proj_bias[e])
                    given = inner @ down + experts.down_proj_bias[e]
                else:
                    inner = act(up @ x)
                    given = down @ inner
                inner.retain_grad()
                found[e].append((inner, g.detach(), token))
                total = total + g * given
            rows.append(total)
        return torch.stack(rows)

    before, experts.forward = experts.forward, forward
    hook = it.anatomy.embedding.register_forward_hook(lambda _, __, y: y.requires_grad_(True))
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        logits = model(input_ids=batch, use_cache=False).logits
        logits.backward(drawn_slope(logits.detach(), generator))
    hook.remove()
    experts.forward = before
    inner = [torch.stack([a.detach() for a, _, _ in x]).double() for x in found]
    weights = [torch.stack([g for _, g, _ in x]).double() for x in found]
    changes = [torch.stack([(a.detach() * a.grad).double() for a, _, _ in x]) for x in found]
    return inner, weights, changes, [torch.tensor([token for _, _, token in x]) for x in found]


def least_squares(inner_PF: Tensor, weight_P: Tensor, outputs_DF: Tensor) -> Tensor:
    """Cost of each neuron, the cheapest first, by a regression on those that are left.

    Each expert's tokens count by the square of their weight; a row more for each neuron damps it.
    """
    rows_PF = weight_P[:, None] * inner_PF / weight_P.square().sum().sqrt()
    damped_PF = torch.cat([rows_PF, (DAMPING * rows_PF.square().sum(0)).sqrt().diag()])
    wanted_PD = damped_PF @ outputs_DF.T
    left, costs, before, most = list(range(inner_PF.shape[1])), {}, 0.0, 0.0

    def rise(kept: list[int]) -> float:
        if not kept:
            return float(wanted_PD.square().sum())
        read = damped_PF[:, kept]
        fitted = torch.linalg.lstsq(read, wanted_PD, driver="gelsd").solution
        return float((wanted_PD - read @ fitted).square().sum())

    while left:
        rises = {i: rise([x for x in left if x != i]) for i in left}
        cheapest = min(left, key=lambda i: rises[i])
        most = max(most, rises[cheapest] - before)
        costs[cheapest], before = most, rises[cheapest]
        left.remove(cheapest)
    return torch.tensor([costs[i] for i in range(len(costs))])


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_costs_are_those_of_a_regression_on_an_expert_s_own_tokens(
    model_type: str, tiny_model
) -> None:
    model = tiny_model(model_type)
    it = probe(model, "expert_neurons")
    ours = surgeon_scores(it)["expert_neurons"].view(3, 6, 24)
    hands = [by_hand(model, it, layer) for layer in range(3)]
    square = torch.zeros(TOKENS.numel()).double()
    for _, _, changes, tokens in hands:
        for change_PF, token_P in zip(changes, tokens, strict=True):
            square.index_add_(0, token_P, change_PF.square().sum(-1))
    softer = square ** (SOFTER / 2 - 1)
    softer *= square.sum() / (square * softer).sum()
    for layer in (0, 2):
        down = it.anatomy.mixture(layer).experts.down_proj.double()
        outputs = down.transpose(1, 2) if model_type == "gpt_oss" else down
        inner, weights, changes, tokens = hands[layer]
        for e in range(6):
            assert len(inner[e]) > 4
            heard = weights[e].square()
            squares = (heard @ inner[e].square()) / heard.sum()
            change_PF = changes[e] * softer[tokens[e]].sqrt()[:, None] / len(TOKENS) ** 0.5
            alone, sequence = change_PF.square().sum(0), tokens[e] // TOKENS.shape[1]
            whole = torch.zeros(len(TOKENS), 24).double().index_add_(0, sequence, change_PF)
            together = whole.square().sum(0)
            ratio = together / alone
            added = ratio[ratio.isfinite()].median()
            size = (alone / squares * added).sqrt() / outputs[e].norm(dim=0)
            expected = least_squares(inner[e], weights[e], outputs[e] * size)
            torch.testing.assert_close(ours[layer, e], expected, rtol=2e-2, atol=0)


def test_an_expert_that_reads_all_tokens_costs_what_a_dense_mlp_does(
    tiny_model,
) -> None:
    dense = tiny_model("qwen3", intermediate_size=24)
    mixed = tiny_model(
        "qwen3_moe", num_experts=1, num_local_experts=1, num_experts_per_tok=1, mlp_only_layers=[]
    )
    state = dict(dense.state_dict())
    for name in [x for x in state if ".mlp." in x]:
        del state[name]
    assert not mixed.load_state_dict(state, strict=False).unexpected_keys
    for ours, theirs in zip(mixed.model.layers, dense.model.layers, strict=True):
        up = torch.cat([theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight])
        ours.mlp.experts.gate_up_proj.data[0] = up
        ours.mlp.experts.down_proj.data[0] = theirs.mlp.down_proj.weight
    expected = surgeon_scores(probe(dense, "neurons"))["neurons"]
    found = surgeon_scores(probe(mixed, "expert_neurons"))["expert_neurons"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_neurons_of_all_mixtures_have_a_score(model_type: str, tiny_model) -> None:
    it = probe(tiny_model(model_type), "expert_neurons")
    scores = METHODS["surgeon"].score(it)["expert_neurons"]
    assert scores.shape == (it.layout.units("expert_neurons"),)
    assert bool(scores.isfinite().all())
    assert float(scores.min()) >= 0
    assert scores.unique().numel() > 100
    fisher = METHODS["fisher"].score(it)["expert_neurons"]
    assert torch.equal(scores, fisher) == (model_type == "llama4_text")
