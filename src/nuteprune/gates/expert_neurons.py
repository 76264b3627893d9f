"""What removing neurons of routed experts costs: the surgeon's curvature, expert by expert.

An expert's down projection reads its neurons' activations a on the tokens that are routed to it,
and the router's weight g multiplies what it gives. So the curvature of its inputs is that of what
is heard, C = sum g^2 a a^T / sum g^2 over these tokens. The gradients of the loss by a have g in
them, and are summed over the same tokens. An expert that reads all tokens at weight 1 has the costs
of a dense MLP.

Shape suffixes: S tokens, K experts of a token, P pairs of a token and its expert, E experts, F
neurons of each, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nuteprune.gates.removal import removal_costs
from nuteprune.model.mixture import Mixture
from nuteprune.model.routing import computed_with
from nuteprune.simulated import alike, has_data

ROWS = 4096
"""Tokens of an expert whose neurons are held at a time."""

Routed = list[tuple[Tensor, Tensor, Tensor]]
"""What experts read (S, D), their indices (S, K) and their weights (S, K), of each batch."""


@contextmanager
def noting_routed(mixture: Mixture | None) -> Iterator[Routed]:
    """Within this context, collect what a layer's experts are called with; None: nothing."""
    routed: Routed = []
    if mixture is None:
        yield routed
        return
    with mixture.experts.register_forward_pre_hook(lambda _, args: routed.append(args)):
        yield routed


def watched_experts(mixture: Mixture, take: Callable[[Tensor], None]) -> Callable[..., Tensor]:
    """Return a forward function of a layer's experts that tells the gradients of their neurons.

    Args:
        mixture: the experts.
        take: told the sums over tokens of squared gradients (E x F,), in a backward pass.
    """

    def watch(inner_PF: Tensor, expert_P: Tensor, _: Tensor) -> Tensor:
        def told(grad_PF: Tensor) -> None:
            squares_EF = grad_PF.new_zeros(mixture.sizes, dtype=torch.float32)
            take(squares_EF.index_add_(0, expert_P, grad_PF.float().square()).flatten())

        inner_PF.register_hook(told)
        return inner_PF

    def forward(hidden_SD: Tensor, index_SK: Tensor, weight_SK: Tensor) -> Tensor:
        return computed_with(mixture.experts, watch, hidden_SD, index_SK, weight_SK)

    return forward


@torch.no_grad()
def neuron_costs(mixture: Mixture, routed: Routed, slopes_EF: Tensor) -> Tensor:
    """Return the cost (E, F) of removing each neuron of a layer's experts, on the CPU.

    Args:
        mixture: the experts.
        routed: what they were called with on calibration text.
        slopes_EF: second moments of the loss's gradients by the neurons.
    """
    down = mixture.stack(mixture.down)
    found = []
    for expert, slopes_F in alike(list(enumerate(slopes_EF)), down):
        weight_DF = mixture.plain(down[expert]).float()
        covariance_FF = neuron_covariance(mixture, routed, expert)
        found += removal_costs(weight_DF, slopes_F.sqrt(), covariance_FF, [len(slopes_F)])
    return torch.stack(found).expand_as(slopes_EF)


def neuron_covariance(mixture: Mixture, routed: Routed, expert: int) -> Tensor:
    """Return C (F, F) of an expert's neurons, in fp32; zeros where no token is routed to it."""
    width, heard = mixture.sizes[1], 0.0
    sum_FF = mixture.stack(mixture.down).new_zeros(width, width, dtype=torch.float32)
    # Which tokens reach an expert is data.
    for hidden_SD, index_SK, weight_SK in filter(lambda x: has_data(x[1]), routed):
        token_P, place_P = (index_SK == expert).nonzero(as_tuple=True)
        for rows_P, weight_P in zip(
            token_P.split(ROWS), weight_SK[token_P, place_P].float().split(ROWS), strict=True
        ):
            inner_PF = _neurons(mixture.experts, hidden_SD[rows_P], expert).float()
            inner_PF *= weight_P.unsqueeze(-1)
            sum_FF.addmm_(inner_PF.T, inner_PF)
            heard += float(weight_P.square().sum())
    return sum_FF.div_(heard or 1.0)


def _neurons(experts: Any, rows_PD: Tensor, expert: int) -> Tensor:
    """Return what an expert's neurons are (P, F) for some tokens."""
    seen: list[Tensor] = []

    def note(inner_PF: Tensor, _: Tensor, pair_P: Tensor) -> Tensor:
        seen.append(torch.empty_like(inner_PF).index_copy_(0, pair_P, inner_PF))
        return inner_PF

    index_P1 = torch.full((len(rows_PD), 1), expert, device=rows_PD.device)
    computed_with(experts, note, rows_PD, index_P1, torch.ones_like(rows_PD[:, :1]))
    return seen[0]
