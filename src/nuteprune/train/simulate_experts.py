"""What scoring and re-fitting routed experts takes: of one that no token reaches, times all.

Which tokens reach an expert is data, which a plan goes without.

Shape suffixes: E experts, F neurons of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from nuteprune.gates.expert_neurons import neuron_costs
from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.mixture import Mixture
from nuteprune.shrink.stacks import fitted_stack, lost_neurons
from nuteprune.simulated import Live
from nuteprune.train.extrapolate import Need


def pricing(anatomy: Anatomy, live: Live) -> Need:
    """Price the neurons of one expert; return what all others multiply."""
    mixtures = list(filter(None, map(anatomy.mixture, range(len(anatomy.layers)))))
    nothing_EF = torch.zeros(mixtures[0].sizes)
    return _others(
        lambda: neuron_costs(mixtures[0], [], nothing_EF[:1]), len(mixtures) * len(nothing_EF), live
    )


def refitting(anatomy: Anatomy, masks: Masks, live: Live) -> Need:
    """Re-fit one expert of those that are to be; return what all others multiply."""
    fitted = [mixture for _, mixture in thin_experts(anatomy, masks)]
    if not fitted:
        return Need(0, 0)
    mask_EF = torch.ones(fitted[0].sizes)
    mask_EF[0, -1:] = 0
    target = fitted[0].stack(fitted[0].down)
    return _others(
        lambda: fitted_stack(fitted[0], [], mask_EF, target), len(fitted) * len(mask_EF), live
    )


def thin_experts(anatomy: Anatomy, masks: Masks) -> Iterator[tuple[int, Mixture]]:
    """Yield the layers whose experts lose neurons and are re-fitted, and these."""
    for i in range(len(anatomy.layers)):
        mixture = anatomy.mixture(i)
        if mixture is not None and lost_neurons(anatomy, masks, i) is not None:
            yield i, mixture


def _others(one: Callable[[], Any], count: int, live: Live) -> Need:
    flops, fine = live.flops, live.fine
    one()
    return Need(0, (live.flops - flops) * (count - 1), fine=(live.fine - fine) * (count - 1))
