"""What removing units costs once the weights that stay are refitted to make up for them.

The loss is taken as quadratic in a projection's weight W (O, I), with the curvature of its inputs
C = X^T X / M and of its outputs, S = D^T D / M of the gradients D. Cutting the columns u out of W
and moving the others so that the loss rises least costs

    tr(V_u^T V_u  ([C^-1]_uu)^-1),    V = S^1/2 W.

The first factor is the second moment of the gradients of X_u. The second is the part of X_u that
the other inputs cannot predict. Removed units predict nothing any more, and the others have made up
for them. So units go one after another, and after each round the others cost what they cost without
those: C^-1 and V follow in closed form. If all went at once, two units that do the same would both
be free, and layers that can spare some units would lose most.

V is not held. The measured change of the loss without X_i gives the length of column i (`lengths`);
W gives its direction.

Neurons of a routed expert have the costs of its own down projection. That reads their activations a
on the tokens that are routed to the expert, and the router's weight g multiplies what it gives. So
the curvature of its inputs is that of what is heard, C = sum g^2 a a^T / sum g^2 over these tokens.
The gradients of the loss by a have g in them. An expert that reads all tokens at weight 1 has the
costs of a dense MLP.

Source: optimal brain surgeon (Hassibi and Stork 1993) with the curvature of K-FAC (Martens and
Grosse 2015, arXiv 1503.05671), for structures of language models: LLM Surgeon (van der Ouderaa et
al. 2024, arXiv 2312.17244); one unit after another, ZipLM (Kurtic, Frantar and Alistarh 2023, arXiv
2302.04089).

Shape suffixes: I inputs of a projection, O its outputs, U units of a kind, W inputs of a unit, R
inputs that go in a round, K inputs that stay; S tokens, K experts of a token, P pairs of a token
and its expert, E experts, F neurons of each, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nuteprune.model.anatomy import Mixture
from nuteprune.processes import ALONE, Team, sum_dtype
from nuteprune.simulated import alike, has_data, number, once, scored, usual

DAMPING = 1e-2
"""Damping: added to the diagonal of C, as a share of each entry."""
LEAST = 1e-30
"""Damping of an input that is always 0: next to nothing, and so is its unit's cost."""
ROUNDING = 1e-2
"""How far C^-1 C may be from 1, along one direction, before it is computed in fp64."""
ROUNDS = 24
"""Rounds in which the units of a layer go."""


class Changes(NamedTuple):
    """What the loss changes by without inputs, to first order, of the tokens of some sequences."""

    squares_S: Tensor
    """Squared changes of each token, summed over inputs."""
    weighed: Callable[[Tensor], Tensor]
    """From weights of these tokens (S,) to squared changes (2, I); see `lengths`."""


def lengths(changes_2I: Tensor, squares_I: Tensor) -> Tensor:
    """Return the lengths |V_i| (I,) at which each input alone costs what was measured.

    K-FAC assumes that gradients do not depend on inputs. But a norm makes gradients small where
    outputs are large, and many neurons are large just where they matter. So the products of each
    input with its gradients count, token by token. An input that is missing from a whole sequence
    costs more, since later layers gather it. There are too few sequences to measure that for each
    input: the median over all of them says how much more.

    Args:
        changes_2I: squared changes of the loss without an input, to first order: without it in one
            token, summed over tokens; without it in a whole sequence.
        squares_I: means of squared inputs, in whatever unit the inputs' covariance has.
    """
    alone_I, together_I = changes_2I.double()
    added = number((together_I / alone_I).nanmedian())
    if not math.isfinite(added):  # a projection that is dead
        added = 1.0
    # An input that is always 0 costs nothing.
    found_I: Tensor = (added * alone_I / squares_I).nan_to_num(0, posinf=0)
    return found_I.sqrt().float()


def removal_costs(
    weight_OI: Tensor, lengths_I: Tensor, covariance_II: Tensor, counts: Sequence[int]
) -> list[Tensor]:
    """Return the cost (U,) of removing each of a projection's units, on the CPU.

    The sum of the n least costs is the cost of removing these n units together. No cost is less
    than that of a unit that goes earlier.

    Each input is damped by its own variance: a unit's cost is then the same in whatever units its
    activations are counted, and one massive activation does not damp all others.

    Args:
        weight_OI: the projection's weight.
        lengths_I: |V_i|; see `lengths`.
        covariance_II: C in fp32; used up.
        counts: units of each kind that the inputs are shared out to.
    """

    def measured() -> list[Tensor]:
        size_I = (covariance_II.diagonal() * (1 + DAMPING) + LEAST).sqrt()
        correlation_II = covariance_II.div_(size_I).div_(size_I[:, None])
        correlation_II.fill_diagonal_(1)
        inverse_II = inverse_of_correlations(correlation_II)
        scaled_OI = weight_OI * (size_I * lengths_I / weight_OI.norm(dim=0).clamp(min=LEAST))
        found = []
        for count in counts:
            rounds = list(removals(scaled_OI.to(inverse_II), inverse_II, count))
            order_U, costs_U = (torch.cat(parts) for parts in zip(*rounds, strict=True))
            found.append(
                torch.zeros(count).to(costs_U).index_copy(0, order_U, costs_U.cummax(0)[0])
            )
        return [scored(costs_U.float()) for costs_U in found]

    return once(measured, weight_OI, *weight_OI.shape, *counts)


def removals(weight_OI: Tensor, inverse_II: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Remove all units in rounds, the cheapest first, and yield (units, their costs).

    The costs of a round's units add up to the cost of removing them together.

    Args:
        weight_OI: V, its columns scaled as the inputs are.
        inverse_II: C^-1.
        count: the number of units.
    """
    width, step = len(inverse_II) // count, -(-count // ROUNDS)
    left_U = torch.arange(count, device=inverse_II.device)
    weight_IO = weight_OI.T.contiguous()  # an input's weights in a row, quick to take out
    for _ in range(-(-count // step)):
        parts_UWO = weight_IO.view(-1, width, weight_IO.shape[1])
        costs_U = _rise(parts_UWO, _diagonal_blocks(inverse_II, width))
        order_U = costs_U.argsort(stable=True)
        gone, stay = order_U[:step], order_U[step:].sort()[0]
        r_R, k_K = _inputs_of(gone, width), _inputs_of(stay, width)
        gone_RO, rows_RI = weight_IO[r_R], inverse_II[r_R]
        inner_RR, outer_RK = rows_RI.index_select(1, r_R), rows_RI.index_select(1, k_K)
        together = _rise(gone_RO, inner_RR)
        alone_U = costs_U[gone]
        yield left_U[gone], alone_U * (together / alone_U.sum().clamp(min=LEAST))
        # How each input that stays makes up for those that go.
        moved_RK = _inverse(inner_RR.double()).to(outer_RK) @ outer_RK
        weight_IO = weight_IO[k_K].addmm_(moved_RK.T, gone_RO, alpha=-1)
        # One index after the other is far quicker than both at once.
        inverse_II = inverse_II.index_select(0, k_K).index_select(1, k_K)
        inverse_II.addmm_(outer_RK.T, moved_RK, alpha=-1)
        left_U = left_U[stay]


def _rise(weight_WO: Tensor, inverse_WW: Tensor) -> Tensor:
    """Return tr(V_u^T V_u ([C^-1]_uu)^-1) of units (..., W, O), given [C^-1]_uu (..., W, W)."""
    moments_WW = weight_WO @ weight_WO.transpose(-1, -2)
    rise: Tensor = (moments_WW * _inverse(inverse_WW.double())).sum((-1, -2))
    return rise.to(weight_WO)


def _diagonal_blocks(matrix_II: Tensor, width: int) -> Tensor:
    """Return the blocks (U, W, W) on the diagonal of a matrix."""
    count = len(matrix_II) // width
    return matrix_II.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _inputs_of(units: Tensor, width: int) -> Tensor:
    """Return the indices of the inputs of some units."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def inverse_of_correlations(correlation_II: Tensor) -> Tensor:
    """Return the inverse (I, I) of correlations: in fp32 where that is exact enough.

    Damping bounds their condition, so fp32 nearly always is. A product with random signs checks it.
    """
    generator = torch.Generator(correlation_II.device).manual_seed(0)
    signs_I = torch.empty_like(correlation_II[0]).uniform_(-1, 1, generator=generator).sign()
    factor_II, failed = torch.linalg.cholesky_ex(correlation_II)
    if usual(failed == 0):
        inverse_II = torch.cholesky_inverse(factor_II)
        error_I = (correlation_II @ (inverse_II @ signs_I) - signs_I).abs()
        if usual(error_I.max() < ROUNDING):
            return inverse_II
    return _inverse(correlation_II.double())


def _inverse(positive: Tensor) -> Tensor:
    """Return the inverse of positive definite matrices (..., I, I)."""
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(positive))
    return inverse


ROWS = 4096
"""Tokens of an expert whose neurons are held at a time."""

Routed = list[tuple[Tensor, Tensor, Tensor]]
"""What experts read (S, D), their indices (S, K) and their weights (S, K), of each batch."""


def watched_experts(
    mixture: Mixture, length: int, note: Callable[[Changes], None]
) -> Callable[..., Tensor]:
    """Return a forward function of a layer's experts that passes on what their neurons change.

    Args:
        mixture: the experts.
        length: tokens of a sequence.
        note: takes in the changes of all neurons, expert after expert, in a backward pass.
    """
    from nuteprune.model.routing import computed_with  # mixtures alone need it

    experts, width = mixture.sizes

    def forward(hidden_SD: Tensor, index_SK: Tensor, weight_SK: Tensor) -> Tensor:
        tokens, chosen = index_SK.shape

        def watch(inner_PF: Tensor, expert_P: Tensor, pair_P: Tensor) -> Tensor:
            read_PF = inner_PF.detach()
            token_P = pair_P // chosen
            place_P = token_P // length * experts + expert_P

            def found(grad_PF: Tensor) -> None:
                change_PF = grad_PF.float() * read_PF
                square_P = change_PF.square().sum(-1)

                def weighed(weight_S: Tensor) -> Tensor:
                    softened_PF = change_PF * weight_S[token_P].sqrt().unsqueeze(-1)
                    sums_2NF = softened_PF.new_zeros(2, tokens // length * experts, width)
                    sums_2NF[0].index_add_(0, place_P, softened_PF.square())
                    sums_2NF[1].index_add_(0, place_P, softened_PF)
                    sums_2NF[1].square_()
                    return sums_2NF.view(2, tokens // length, -1).sum(1)

                note(Changes(square_P.new_zeros(tokens).index_add(0, token_P, square_P), weighed))

            inner_PF.register_hook(found)
            return inner_PF

        return computed_with(mixture.experts, watch, hidden_SD, index_SK, weight_SK)

    return forward


@torch.no_grad()
def neuron_costs(
    mixture: Mixture, routed: Routed, changes_2EF: Tensor, team: Team = ALONE
) -> Tensor:
    """Return the cost (E, F) of removing each neuron of a layer's experts, on the CPU.

    Args:
        mixture: the experts.
        routed: the arguments of their calls on this process's calibration text.
        changes_2EF: what the loss changes by without a neuron; see `lengths`.
        team: the processes that share the text out.
    """
    down = mixture.stack(mixture.down)
    found = []
    for expert, changes_2F in alike(list(enumerate(changes_2EF.unbind(1))), down):
        weight_DF = mixture.plain(down[expert]).float()
        covariance_FF = neuron_covariance(mixture, routed, expert, team)
        lengths_F = lengths(changes_2F, covariance_FF.diagonal())
        found += removal_costs(weight_DF, lengths_F, covariance_FF, [len(lengths_F)])
    return torch.stack(found).expand(mixture.sizes)


def neuron_covariance(mixture: Mixture, routed: Routed, expert: int, team: Team = ALONE) -> Tensor:
    """Return C (F, F) of an expert's neurons, in fp32; zeros where no token is routed to it."""
    width, heard = mixture.sizes[1], torch.zeros((), dtype=torch.float64)
    device = mixture.stack(mixture.down).device
    sum_FF = torch.zeros(width, width, dtype=sum_dtype(device), device=device)
    # Which tokens reach an expert is data.
    for hidden_SD, index_SK, weight_SK in filter(lambda x: has_data(x[1]), routed):
        token_P, place_P = (index_SK == expert).nonzero(as_tuple=True)
        for rows_P, weight_P in zip(
            token_P.split(ROWS), weight_SK[token_P, place_P].float().split(ROWS), strict=True
        ):
            inner_PF = _neurons(mixture.experts, hidden_SD[rows_P], expert).float()
            inner_PF *= weight_P.unsqueeze(-1)
            sum_FF += inner_PF.T @ inner_PF
            heard += float(weight_P.square().sum())
    team.add_up((sum_FF, heard))
    return sum_FF.div_(float(heard) or 1.0).float()


def _neurons(experts: Any, rows_PD: Tensor, expert: int) -> Tensor:
    """Return what an expert's neurons are (P, F) for some tokens."""
    from nuteprune.model.routing import computed_with  # mixtures alone need it

    seen: list[Tensor] = []

    def note(inner_PF: Tensor, _: Tensor, pair_P: Tensor) -> Tensor:
        seen.append(torch.empty_like(inner_PF).index_copy_(0, pair_P, inner_PF))
        return inner_PF

    index_P1 = torch.full((len(rows_PD), 1), expert, device=rows_PD.device)
    computed_with(experts, note, rows_PD, index_P1, torch.ones_like(rows_PD[:, :1]))
    return seen[0]
