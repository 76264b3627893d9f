"""Scores of whole routed experts: how much each contributes, and what changes without it.

Shape suffixes: S tokens, L experts that are left, K = k experts of a token, J = k + 1, P = S x K, E
experts of a layer, N of all layers, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.gates.scores import Probe
from nuteprune.model.anatomy import Anatomy, Mixture, without_lora
from nuteprune.model.forwards import noting_calls
from nuteprune.model.layerwise import Layerwise
from nuteprune.model.routing import rows_of
from nuteprune.model.weights import gathered
from nuteprune.processes import Team
from nuteprune.simulated import has_data, scored

ROUNDS = 24
"""Rounds in which the experts of a layer go, at most."""


def removal_order(probe: Probe) -> Tensor:
    """Return each expert's place (N,) in the order in which its layer loses experts.

    See `gates.importance.reconstruction`.
    """
    anatomy = probe.anatomy
    text = Layerwise(anatomy, probe.hooks, None, probe.plain_batches, probe.team)
    parts = []
    for layer, module in enumerate(anatomy.layers):
        mixture = anatomy.mixture(layer)
        with noting_calls(mixture.router if mixture else None) as calls:
            text.advance(layer)
        if mixture is not None:
            with gathered(module):
                # Only here: what a layer's router reads is large.
                read = (args[0].flatten(0, -2) for args in calls)
                parts.append(_order(mixture, list(read), probe.team))
        probe.progress()
    return torch.cat(parts)


@torch.no_grad()
def _order(mixture: Mixture, read: Sequence[Tensor], team: Team) -> Tensor:
    """Return the places (E,) of a layer's experts, given this process's batches (S, D)."""
    left, gone = list(range(mixture.sizes[0])), list[int]()
    if not all(map(has_data, read)):  # which experts go is data
        return torch.tensor(left).float()
    step = -(-(len(left) - mixture.per_token) // ROUNDS)
    dense: list[Tensor] = []
    while len(left) > mixture.per_token:
        loss = dict.fromkeys(left, 0.0)
        for batch, hidden_SD in enumerate(read):
            given_SD, without = _outputs(mixture, hidden_SD, left)
            if not gone:
                dense.append(given_SD)
            for expert, output_SD in zip(left, without, strict=True):
                loss[expert] += float((output_SD.float() - dense[batch].float()).square().sum())
        loss_L = torch.tensor([loss[expert] for expert in left], dtype=torch.float64)
        team.add_up([loss_L])
        left = [left[i] for i in loss_L.argsort(stable=True).tolist()]
        step = min(step, len(left) - mixture.per_token)
        gone, left = gone + left[:step], left[step:]
    return torch.tensor(gone + left).argsort().float()


def _outputs(
    mixture: Mixture, hidden_SD: Tensor, left: Sequence[int]
) -> tuple[Tensor, Iterator[Tensor]]:
    """Return the output of the experts left (S, D), and their outputs without each one.

    Args:
        mixture: a layer's experts, some of which are gone.
        hidden_SD: what they read.
        left: those that are left, more than a token is routed to.
    """
    weight_SE = _weights(mixture, hidden_SD, left)
    without = [_weights(mixture, hidden_SD, [x for x in left if x != e]) for e in left]
    # Whoever is chosen at all, by each token: its k best, and the one that steps in.
    most_SE = reduce(torch.maximum, without, weight_SE)
    chosen_SJ = most_SE.topk(mixture.per_token + 1).indices
    given_SJD = _given(mixture, hidden_SD, chosen_SJ, most_SE)

    def heard(weight_SE: Tensor) -> Tensor:
        weight_SJ = weight_SE.gather(1, chosen_SJ)
        if mixture.entry.weighed_first:
            weight_SJ = (weight_SJ > 0).to(weight_SJ)
        return torch.einsum("sj,sjd->sd", weight_SJ, given_SJD)

    return heard(weight_SE), map(heard, without)


def _weights(mixture: Mixture, hidden_SD: Tensor, left: Sequence[int]) -> Tensor:
    """Return each token's weights (S, E) if these experts are all that there are."""
    left_L = torch.tensor(left, device=hidden_SD.device)
    with rows_of(mixture.router, left_L):
        # `forward`, not a call: hooks that watch must not run for it.
        routed = without_lora(mixture.router).forward(hidden_SD)
    weight_SE = hidden_SD.new_zeros(len(hidden_SD), mixture.sizes[0])
    if mixture.entry.weighed_first:
        return weight_SE.index_copy_(1, left_L, routed[0].to(weight_SE))
    _, weight_SK, index_SK = routed
    return weight_SE.scatter_(1, left_L[index_SK], weight_SK.to(weight_SE))


def _given(mixture: Mixture, hidden_SD: Tensor, chosen_SJ: Tensor, weight_SE: Tensor) -> Tensor:
    """Return what some experts of each token give, not weighed yet (S, J, D)."""
    experts = mixture.experts
    if mixture.entry.weighed_first:
        read_ESD = weight_SE.T.unsqueeze(-1) * hidden_SD
        all_ESD = experts.forward(read_ESD.flatten(0, 1)).view_as(read_ESD)
        return torch.take_along_dim(all_ESD.transpose(0, 1), chosen_SJ.unsqueeze(-1), 1)
    return _alone(experts, hidden_SD, chosen_SJ).view(*chosen_SJ.shape, -1)


def _alone(experts: Any, hidden_SD: Tensor, index_SK: Tensor) -> Tensor:
    """Return what each token's experts give (S x K, D), one by one, heard in full."""
    each_PD = hidden_SD.repeat_interleave(index_SK.shape[1], 0)
    # `forward`, not a call: hooks that watch must not run for it.
    given_PD: Tensor = experts.forward(
        each_PD, index_SK.reshape(-1, 1), torch.ones_like(each_PD[:, :1])
    )
    return given_PD


class Heard:
    """Sums over the tokens that are routed to each expert of a layer, in fp64 on the CPU.

    Args:
        mixture: the layer's experts.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self.tokens_E = torch.zeros(mixture.sizes[0], dtype=torch.float64)
        self.loud_E = torch.zeros(mixture.sizes[0], dtype=torch.float64)

    def reap(self) -> Tensor:
        """Return the mean (E,) over an expert's tokens of its weight x the norm of its output."""
        return (self.loud_E / self.tokens_E.clamp(min=1)).float()

    def add(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Add a routed batch: the experts' inputs, indices, weights."""
        hidden_SD, index_SK, weight_SK = args
        if not has_data(hidden_SD):
            return
        chosen_P = index_SK.flatten().cpu()
        self.tokens_E += torch.bincount(chosen_P, minlength=len(self.tokens_E))
        output_PD = _alone(self._mixture.experts, hidden_SD, index_SK)
        heard_P = weight_SK.flatten().double() * output_PD.double().norm(dim=-1)
        self.loud_E.index_add_(0, chosen_P, heard_P.cpu())

    def add_weighed(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Add a batch that all experts read, weighed before: inputs (E x S, D) and outputs."""
        count = len(self.tokens_E)
        read_ESD, output_ESD = (x.view(count, -1, x.shape[-1]) for x in (args[0], output))
        self.tokens_E += scored((read_ESD != 0).any(-1).sum(1))
        self.loud_E += scored(output_ESD.double().norm(dim=-1).sum(1))


@contextmanager
def hearing_experts(anatomy: Anatomy) -> Iterator[list[Heard]]:
    """Sum up how much each expert contributes, layer after layer.

    Yields:
        The sums of each layer that has experts; complete when the model has read the text.
    """
    found = []
    with ExitStack() as stack:
        for mixture in filter(None, map(anatomy.mixture, range(len(anatomy.layers)))):
            heard, experts = Heard(mixture), mixture.experts
            found.append(heard)
            if mixture.entry.weighed_first:
                stack.enter_context(experts.register_forward_hook(heard.add_weighed))
            else:
                stack.enter_context(experts.register_forward_pre_hook(heard.add))
        yield found
