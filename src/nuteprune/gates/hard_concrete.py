"""Hard-concrete gates: pure maths (Louizos, Welling and Kingma 2018, arXiv 1712.01312).

A gate is a sigmoid of log-alpha plus logistic noise, stretched beyond [0, 1] and clipped, so that
it is exactly 0 or 1 with positive probability and differentiable in between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
TEMPERATURE = 2 / 3
LOG_ALPHA_MIN, LOG_ALPHA_MAX = math.log(0.01), math.log(100)
SHARPNESS = 0.8
"""Factor on log-alpha at test time, as in the authors' code."""


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Return gates drawn with given noise, in [0, 1] and of the shape of `log_alpha`.

    Args:
        log_alpha: location of each gate.
        uniform: noise in (0, 1), of the same shape.
    """
    noise = torch.log(uniform) - torch.log1p(-uniform)
    soft = torch.sigmoid((noise + log_alpha) / TEMPERATURE)
    return (soft * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0.0, 1.0)


def keep_probability(log_alpha: Tensor) -> Tensor:
    """Return the probability that each gate is not 0 (equation 12 of the paper)."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-STRETCH_LOW / STRETCH_HIGH))


def test_value(log_alpha: Tensor) -> Tensor:
    """Return the noiseless soft value of each gate that is kept."""
    return torch.sigmoid(SHARPNESS * log_alpha / TEMPERATURE)
