"""Scores of whole routed experts: how much each contributes, and what changes without it.

Shape suffixes: S tokens, L experts that are left, K = k experts of a token, J = k + 1, P = S x J, E
experts of a layer, N of all layers, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.gates.scores import Probe, Scores, ranked
from nuteprune.model.anatomy import Anatomy, Mixture, without_lora
from nuteprune.model.layerwise import Layerwise
from nuteprune.model.routing import rows_of
from nuteprune.model.sharding import gathered
from nuteprune.processes import Team
from nuteprune.simulated import has_data, scored

ROUNDS = 24
"""Rounds in which the experts of a layer go, at most."""


def reconstruction(probe: Probe) -> Scores:
    """Experts go one after another, each time the one whose removal changes the output least.

    L(R) = sum over tokens x of |y_R(x) - y(x)|_2^2, with y what the layer's routed experts give,
    and y_R what they give once the router has no rows for the experts R: the next best stand in,
    and weights are made to sum to 1 where the family does that. The next expert e to go is the one
    with the least L(R and e); its rank in the layer is its place in this order. REAP, in contrast,
    takes an expert's output as lost, and does not see that one of two equal experts has to stay.
    Source: the reconstruction loss of Lu et al. 2024 (NAEE, arXiv 2402.14800), who try all sets of
    experts; here greedily, in at most 24 rounds.
    """
    for _ in probe.batches:  # the other text is read
        probe.progress()
    return ranked(probe, {"experts": removal_order(probe)})


def removal_order(probe: Probe) -> Tensor:
    """Return each expert's place (N,) in the order in which its layer loses experts."""
    anatomy = probe.anatomy
    text = Layerwise(anatomy, probe.hooks, None, probe.plain_batches, probe.team)
    parts = []
    for layer, module in enumerate(anatomy.layers):
        mixture = anatomy.mixture(layer)
        read: list[Tensor] = []
        if mixture is None:
            text.advance(layer)
        else:
            with mixture.router.register_forward_pre_hook(
                lambda _, args, read=read: read.append(args[0].flatten(0, -2))
            ):
                text.advance(layer)
            with gathered(module):
                parts.append(_order(mixture, read, probe.team))
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
            given_SD, without = Rerouted(mixture, left).outputs(hidden_SD)
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


@dataclass(frozen=True)
class Rerouted:
    """A layer some of whose experts are gone.

    Args:
        mixture: its experts.
        left: those that are left, more than a token is routed to.
    """

    mixture: Mixture
    left: Sequence[int]

    def outputs(self, hidden_SD: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
        """Return the output of the experts left (S, D), and their outputs without each one."""
        left = self.left
        weight_SE = self._weights(hidden_SD, left)
        without = [self._weights(hidden_SD, [x for x in left if x != e]) for e in left]
        # Whoever is chosen at all, by each token: its k best, and the one that steps in.
        most_SE = reduce(torch.maximum, without, weight_SE)
        chosen_SJ = most_SE.topk(self.mixture.per_token + 1).indices
        given_SJD = self._given(hidden_SD, chosen_SJ, most_SE)

        def heard(weight_SE: Tensor) -> Tensor:
            weight_SJ = weight_SE.gather(1, chosen_SJ)
            if self.mixture.entry.weighed_first:
                weight_SJ = (weight_SJ > 0).to(weight_SJ)
            return torch.einsum("sj,sjd->sd", weight_SJ, given_SJD)

        return heard(weight_SE), map(heard, without)

    def _weights(self, hidden_SD: Tensor, left: Sequence[int]) -> Tensor:
        """Return each token's weights (S, E) if these experts are all that there are."""
        left_L = torch.tensor(left, device=hidden_SD.device)
        with rows_of(self.mixture.router, left_L):
            # `forward`, not a call: hooks that watch must not run for it.
            routed = without_lora(self.mixture.router).forward(hidden_SD)
        weight_SE = hidden_SD.new_zeros(len(hidden_SD), self.mixture.sizes[0])
        if self.mixture.entry.weighed_first:
            return weight_SE.index_copy_(1, left_L, routed[0].to(weight_SE))
        _, weight_SK, index_SK = routed
        return weight_SE.scatter_(1, left_L[index_SK], weight_SK.to(weight_SE))

    def _given(self, hidden_SD: Tensor, chosen_SJ: Tensor, weight_SE: Tensor) -> Tensor:
        """Return what some experts of each token give, not weighed yet (S, J, D)."""
        experts = self.mixture.experts
        if self.mixture.entry.weighed_first:
            read_ESD = weight_SE.T.unsqueeze(-1) * hidden_SD
            all_ESD = experts.forward(read_ESD.flatten(0, 1)).view_as(read_ESD)
            return torch.take_along_dim(all_ESD.transpose(0, 1), chosen_SJ.unsqueeze(-1), 1)
        each_PD = hidden_SD.repeat_interleave(chosen_SJ.shape[1], 0)
        alone_P1 = torch.ones_like(each_PD[:, :1])
        given_PD: Tensor = experts.forward(each_PD, chosen_SJ.reshape(-1, 1), alone_P1)
        return given_PD.view(*chosen_SJ.shape, -1)


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
        chosen = index_SK.flatten()
        self.tokens_E += torch.bincount(chosen.cpu(), minlength=len(self.tokens_E))
        # As many tokens as there are pairs, each with one expert, which is heard in full.
        each_SD = hidden_SD.repeat_interleave(index_SK.shape[-1], 0)
        alone = torch.ones_like(weight_SK).view(-1, 1)
        # `forward`, not a call: this hook must not run for it.
        output_SD = self._mixture.experts.forward(each_SD, chosen.view(-1, 1), alone)
        heard_S = weight_SK.flatten().double() * output_SD.double().norm(dim=-1)
        self.loud_E.index_add_(0, chosen.cpu(), heard_S.cpu())

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


def reap(probe: Probe) -> Scores:
    """Router-weighted expert activation: how much an expert contributes, ranked within its layer.

    S_j = mean over the tokens x that are routed to expert j of g_j(x) |f_j(x)|_2, with g_j the
    weight that the layer gives the expert (after the top k are made to sum to 1, where the family
    does that) and f_j(x) what the expert puts out. An expert that no token goes to has 0.
    Source: REAP, equation 9 of Lasby et al. 2025 (arXiv 2510.13999); its public code
    (CerebrasResearch/reap) gives the same numbers with `renormalize_router_weights`.
    """
    with hearing_experts(probe.anatomy) as heard:
        probe.read()
    probe.team.add_up(x for layer in heard for x in (layer.tokens_E, layer.loud_E))
    return ranked(probe, {"experts": torch.cat([layer.reap() for layer in heard])})
