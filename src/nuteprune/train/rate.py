"""The learning rate of LoRA, from the size of the weights that it is added to."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Final

import torch
from torch import Tensor, nn

from nuteprune.model.anatomy import Anatomy
from nuteprune.model.packed import weight_of
from nuteprune.simulated import has_data

RATE: Final = 4e-4
"""For projections of gain 1, whose outputs are as large as their inputs."""


def usual_rate(anatomy: Anatomy) -> float:
    """Return the learning rate where none is given: `RATE` times the mean gain of the projections.

    Adam changes LoRA by about the rate in each step, and so the output of a projection by the same
    amount whatever its weights are. For the change to be as large a share of the output in every
    model, the rate goes with the gain. That of two models differs fivefold: see docs/log.md.

    Args:
        anatomy: the dense model.

    Returns:
        The rate, rounded to two digits.
    """
    layers = range(len(anatomy.layers))
    found = (anatomy.linear(i, p) for i in layers for p in anatomy.family.projections)
    gains = [gain(x) for x in found if x is not None]
    return float(f"{RATE * fmean(gains or [1.0]):.2g}")


def gain(linear: nn.Linear) -> float:
    """Return how much larger a projection's outputs are than its inputs, if these are random.

    That is the root mean square of its weights times the root of its number of inputs. Without
    data it is 1.
    """
    weight: Tensor = weight_of(linear)
    if not has_data(weight) or weight.is_meta:
        return 1.0
    size = torch.linalg.vector_norm(weight, dtype=torch.float32)
    return float(size) / math.sqrt(weight.numel() / linear.in_features)
