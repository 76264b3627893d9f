"""How far a layer's output moves when experts go and its router runs on over those that stay.

A token that loses one of its k experts goes to the next best, and its weights are made anew. So the
outputs of the k + 1 best experts of a token tell what it gets without any of them: one expert more
is computed for each token.

Shape suffixes: S tokens, L experts that are left, K = k experts of a token, J = k + 1, P = S x J, E
experts of a layer, N of all layers, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from nuteprune.gates.probe import Probe, Scores
from nuteprune.gates.units import ranked
from nuteprune.model.anatomy import without_lora
from nuteprune.model.layerwise import Layerwise
from nuteprune.model.mixture import Mixture
from nuteprune.model.routing import rows_of
from nuteprune.model.sharding import gathered
from nuteprune.simulated import has_data

ROUNDS = 24
"""Rounds in which the experts of a layer go, at most."""


def reconstruction(probe: Probe) -> Scores:
    """Experts go one after another, each the one that the layer's output moves least without.

    L(R) = sum over tokens x of |y_R(x) - y(x)|_2^2, with y what the layer's routed experts give,
    and y_R what they give once the router has no rows for the experts R: the next best stand in,
    and weights are made to sum to 1 where the family does that. The next to go is the e of least
    L(R and e); its place in this order is its rank within its layer. REAP, in contrast, takes what
    an expert adds as lost, and does not see that one of two that do the same has to stay.
    Source: the reconstruction loss of Lu et al. 2024 (NAEE, arXiv 2402.14800), who try all sets of
    experts; here greedily, in at most 24 rounds.
    """
    for _ in probe.batches:  # the other text is read
        probe.progress()
    return ranked(probe, {"experts": removal_order(probe)})


def removal_order(probe: Probe) -> Tensor:
    """Return each expert's place (N,) in the order in which those of its layer go."""
    anatomy = probe.anatomy
    text = Layerwise(anatomy, probe.hooks, None, probe.plain_batches)
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
                parts.append(_order(mixture, read))
        probe.progress()
    return torch.cat(parts)


@torch.no_grad()
def _order(mixture: Mixture, read: Sequence[Tensor]) -> Tensor:
    """Return the places (E,) of a layer's experts, given batches of what it reads (S, D)."""
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
        left.sort(key=loss.__getitem__)
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
        """Return what those that are left give (S, D), and what they give without each of them."""
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
