"""What routed experts do on text: how much of each is heard.

Shape suffixes: S tokens, K experts of a token, E experts, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.gates.probe import Probe, Scores
from nuteprune.gates.units import ranked
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.mixture import Mixture
from nuteprune.simulated import has_data, scored


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
        """Take in a batch that is routed: what the experts read, indices, weights."""
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
        """Take in a batch that all experts read, weighed before: (E x S, D), and what they give."""
        count = len(self.tokens_E)
        read_ESD, output_ESD = (x.view(count, -1, x.shape[-1]) for x in (args[0], output))
        self.tokens_E += scored((read_ESD != 0).any(-1).sum(1))
        self.loud_E += scored(output_ESD.double().norm(dim=-1).sum(1))


@contextmanager
def hearing_experts(anatomy: Anatomy) -> Iterator[list[Heard]]:
    """Sum up what the experts of all layers do, layer after layer.

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
    """Router-weighted expert activation: how much of an expert is heard, ranked within its layer.

    S_j = mean over the tokens x that are routed to expert j of g_j(x) |f_j(x)|_2, with g_j the
    weight that the layer gives the expert (after the top k are made to sum to 1, where the family
    does that) and f_j(x) what the expert puts out. An expert that no token goes to has 0.
    Source: REAP, equation 9 of Lasby et al. 2025 (arXiv 2510.13999); its public code
    (CerebrasResearch/reap) gives the same numbers with `renormalize_router_weights`.
    """
    with hearing_experts(probe.anatomy) as heard:
        probe.read()
    return ranked(probe, {"experts": torch.cat([layer.reap() for layer in heard])})
