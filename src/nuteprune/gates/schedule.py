"""The sparsity schedule, and the Lagrangian that drives expected sparsity along it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """One target's share of a run: a ramp to it, then rest.

    Args:
        start: sparsity that the ramp sets out from.
        target: sparsity that it leads to.
        first: the stage's first step, counted from 0 over the whole run.
        steps: the stage's steps.
        ramp_steps: steps by the last of which the target is asked for.
        freeze_step: step before which masks are fixed, counted over the whole run.
    """

    start: float
    target: float
    first: int
    steps: int
    ramp_steps: int
    freeze_step: int

    @property
    def end(self) -> int:
        """The first step after the stage."""
        return self.first + self.steps

    def resting(self, step: int) -> bool:
        """Return whether the ramp is over at a step."""
        return step - self.first + 1 >= self.ramp_steps

    def rested(self, step: int) -> float:
        """Return the share of the way back through the teachers that will be over after a step.

        The way back takes all of the rest, as published, or as long as the ramp where that is less:
        a teacher is worth as many steps as it took to get past it. From then on it is 1 or more.
        """
        left = max(1, min(self.steps - self.ramp_steps, self.ramp_steps))
        return (step - self.first - self.ramp_steps + 1) / left


@dataclass(frozen=True)
class Schedule:
    """Sparsity over the steps of a run: for each target in turn, a ramp to it, then rest.

    Args:
        targets: sparsities to reach, growing; each gets an equal share of the steps.
        steps: optimizer steps of the whole run, at least one for each target.
        ramp_share: share of a stage's steps by which its target is reached.
        freeze_share: share of a stage's steps by which masks are fixed, if later than the ramp;
            where both shares are 0 they are fixed before the stage's first step.
    """

    targets: tuple[float, ...]
    steps: int
    ramp_share: float = 0.5
    freeze_share: float = 0.0

    def stage(self, step: int) -> Stage:
        """Return the stage that a step, counted from 0, belongs to."""
        index = self._index(step)
        first, end = self._first(index), self._first(index + 1)
        ramp = max(1, min(end - first, round((end - first) * self.ramp_share)))
        freeze = max(ramp if self.ramp_share else 0, round((end - first) * self.freeze_share))
        return Stage(
            self.targets[index - 1] if index else 0.0,
            self.targets[index],
            first,
            end - first,
            ramp,
            first + freeze,
        )

    @property
    def stages(self) -> list[Stage]:
        """Each target's share of the run."""
        return [self.stage(self._first(i)) for i in range(len(self.targets))]

    @property
    def ramp_steps(self) -> int:
        """Steps of all ramps together."""
        return sum(stage.ramp_steps for stage in self.stages)

    @property
    def ramps(self) -> bool:
        """Whether a target is reached over several steps."""
        return any(stage.ramp_steps > 1 for stage in self.stages)

    def _first(self, index: int) -> int:
        return self.steps * index // len(self.targets)

    def _index(self, step: int) -> int:
        return max(i for i in range(len(self.targets)) if self._first(i) <= max(0, step))

    def sparsity(self, step: int) -> float:
        """Return what is asked for at a step, counted from 0."""
        stage = self.stage(step)
        share = min(1.0, (step - stage.first + 1) / stage.ramp_steps)
        return stage.start + (stage.target - stage.start) * share


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
