"""How much is to be removed when, and the Lagrangian that drives expected sparsity there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Sparsity over the steps of a run: a ramp to the target, then the target.

    Args:
        target: sparsity to end at.
        steps: optimizer steps of the whole run.
        ramp_share: share of the steps by which the target is reached.
        power: 1 rises linearly; 3 rises fast at first and slowly near the target (cubic).
    """

    target: float
    steps: int
    ramp_share: float = 0.5
    power: float = 1.0

    @property
    def ramp_steps(self) -> int:
        """Steps until the target is asked for, at least one."""
        return max(1, min(self.steps, round(self.steps * self.ramp_share)))

    def sparsity(self, step: int) -> float:
        """Return what is asked for at a step, counted from 0."""
        left = 1 - min(1.0, (step + 1) / self.ramp_steps)
        return self.target * float(1 - left**self.power)

    def done(self, step: int) -> bool:
        """Return whether the ramp is over at a step."""
        return step + 1 >= self.ramp_steps


class Lagrangian(nn.Module):
    """Penalty lambda1 (s - t) + lambda2 (s - t)^2, minimised by gates, maximised by lambdas.

    The lambdas' optimizer must ascend: give their parameter group `maximize=True`.
    Source: the paper's sparsity loss, after Wang, Wohlwend and Lei 2020 (arXiv 1910.04732).
    """

    def __init__(self) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.zeros(()))
        self.lambda2 = nn.Parameter(torch.zeros(()))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """Return the penalty, a scalar, for expected and asked-for sparsity."""
        gap = sparsity - target
        return self.lambda1 * gap + self.lambda2 * gap.square()
