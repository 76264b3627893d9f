"""Deterministic gates: pure maths (after Huang et al. 2026, arXiv 2603.08065).

A gate is a multiplier m >= 0 without noise and without an upper bound, used as it is in training
and afterwards. What counts for sparsity is its score tanh(m / temperature): smooth, 0 where the
unit is gone, near 1 where it is kept. As the temperature falls, the score becomes the step function
that sparsity really is, and a further term pushes scores that are undecided to 0 or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

HOT, COLD = 0.25, 0.05
"""Temperature at the start and at the target."""
LOWEST_START = 0.5
"""Multiplier that the least important unit starts from; the most important starts at 1."""
LEAST_KEPT = 0.05
"""Multiplier that a kept unit has at least; below it, folding would divide by next to nothing."""


def temperature(progress: float) -> float:
    """Return the temperature when a share of the way to the target is gone, falling geometrically.

    Args:
        progress: sparsity there is / target; beyond 1 counts as 1.
    """
    return HOT * float((COLD / HOT) ** min(1.0, max(0.0, progress)))


def score(multiplier: Tensor, temperature: float) -> Tensor:
    """Return how much each unit counts as kept, in [0, 1)."""
    return torch.tanh(multiplier / temperature)


def undecided(score: Tensor) -> Tensor:
    """Return 4 s (1 - s): 1 for a score in the middle, 0 for one that is 0 or 1."""
    return 4 * score * (1 - score)


def push(multiplier: Tensor, amount: float, temperature: float) -> Tensor:
    """Move multipliers down the slope of their scores, and no further than to 0.

    This is a gradient step on the sparsity: a unit at 0 would move by `amount`, one whose score is
    saturated hardly moves, so the undecided ones go.

    Args:
        multiplier: (N,), not negative.
        amount: the step, at least 0.
        temperature: of the scores.
    """
    # 1 / cosh^2 and not 1 - tanh^2, which in fp32 is 0 for all that are well kept.
    slope = torch.cosh((multiplier / temperature).clamp(max=40)).reciprocal().square()
    return (multiplier - amount * slope).clamp(min=0)


def start(survival: Tensor) -> Tensor:
    """Return first multipliers (N,): 1 for units that stay longest, flat near there.

    Args:
        survival: in [0, 1], how long each unit would stay while sparsity grows.
    """
    return 1 - (1 - LOWEST_START) * (1 - survival).square()
