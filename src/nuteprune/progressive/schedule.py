"""The sparsity schedule, and the Lagrangian that drives expected sparsity along it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Sparsity over the steps of a run: a ramp to the target, then rest.

    Args:
        target: sparsity to reach.
        steps: optimizer steps of the whole run.
        ramp_share: share of the steps by which the target is reached.
        freeze_share: share of the steps by which masks are fixed, if later than the ramp; where
            both shares are 0 they are fixed before the first step.
    """

    target: float
    steps: int
    ramp_share: float = 0.5
    freeze_share: float = 0.0

    @property
    def ramp_steps(self) -> int:
        """The number of steps until the schedule asks for the target."""
        return max(1, min(self.steps, round(self.steps * self.ramp_share)))

    @property
    def freeze_step(self) -> int:
        """Step before which masks are fixed, counted from 0."""
        ramp = self.ramp_steps if self.ramp_share else 0
        return max(ramp, round(self.steps * self.freeze_share))

    @property
    def ramps(self) -> bool:
        """Whether the target is reached over several steps."""
        return self.ramp_steps > 1

    def sparsity(self, step: int) -> float:
        """Return the scheduled sparsity at a step, counted from 0."""
        return self.target * min(1.0, (step + 1) / self.ramp_steps)

    def rests(self, step: int) -> bool:
        """Return whether the ramp is over at a step."""
        return step + 1 >= self.ramp_steps

    def rested(self, step: int) -> float:
        """Return the share of the way back through the teachers that will be over after a step.

        The way back takes all of the rest, as published, or as long as the ramp where that is less:
        a teacher serves as many steps as the ramp took to pass it. After that it is 1 or more.
        """
        left = max(1, min(self.steps - self.ramp_steps, self.ramp_steps))
        return (step - self.ramp_steps + 1) / left


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
