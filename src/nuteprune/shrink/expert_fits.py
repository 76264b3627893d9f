"""Closed-form refit of routed experts' down projections, each on its own tokens.

A routed expert is heard as g x its output, with g the router's weight of a token. So its down
projection is fitted on its own tokens, those that the pruned model routes to it, squared errors
counted g^2 times. It makes up for nothing else.

Shape suffixes: D hidden width, E experts, F neurons of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nuteprune.gates.masks import Masks
from nuteprune.gates.surgeon_costs import Routed, neuron_covariance
from nuteprune.model.anatomy import Anatomy, Mixture
from nuteprune.processes import Team
from nuteprune.shrink.least_squares import has_lost, ridge_fit
from nuteprune.simulated import alike


def lost_neurons(anatomy: Anatomy, masks: Masks, layer: int) -> Tensor | None:
    """Return multipliers (E, F) of a layer's experts, of which some are 0; else None.

    Multipliers of removed experts are 1. Also None where experts do not show their neurons.
    """
    mixture, neurons = anatomy.mixture(layer), masks.part("expert_neurons", layer)
    if mixture is None or neurons is None or mixture.entry.weighed_first:
        return None
    neurons_EF = neurons.view(mixture.sizes)
    if (experts_E := masks.part("experts", layer)) is not None:
        neurons_EF = neurons_EF.masked_fill((experts_E <= 0).unsqueeze(-1), 1.0)
    return neurons_EF if has_lost(neurons_EF) else None


@torch.no_grad()
def fitted_stack(
    mixture: Mixture, routed: Routed, mask_EF: Tensor, target: Tensor, team: Team
) -> Tensor:
    """Return the stack of down projections, in the entry's layout, fitted where neurons are gone.

    Columns of neurons that are gone stay as they were, for neurons that may return.

    Args:
        mixture: the experts, their neurons whole.
        routed: the experts' inputs in the pruned model, on this process's calibration text.
        mask_EF: multipliers of neurons, 0 where they are gone.
        target: the stack whose outputs from all neurons the fit aims at.
        team: the processes that share the text out.
    """
    stack = mixture.stack(mixture.down).detach()
    fitted = stack.clone()
    thin = [i for i, mask_F in enumerate(mask_EF) if has_lost(mask_F)]
    for expert in alike(thin, stack):
        mask_F, kept_F = mask_EF[expert], mask_EF[expert] > 0
        own_DF, wanted_DF = (mixture.plain(x[expert]).float() for x in (stack, target))
        covariance_FF = neuron_covariance(mixture, routed, expert, team)
        new_DF = ridge_fit(own_DF, covariance_FF, mask_F.to(own_DF), wanted_DF)
        mixture.plain(fitted[expert]).copy_(torch.where(kept_F, new_DF, own_DF))
    return fitted
