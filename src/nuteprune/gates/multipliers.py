"""Deterministic gates: multipliers that are trained as they are used, and stay as they are trained.

Shape suffix: N units of one kind in the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nuteprune.gates import deterministic
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.masks import Masks
from nuteprune.gates.soft import SoftGates
from nuteprune.gates.units import unit_parameters

RUNGS = 16
"""Sparsities at which `survival` asks what is kept."""


class DeterministicGates(SoftGates):
    """Multipliers without noise: what is trained is what stays.

    With `solved`, each step begins by moving multipliers down the slopes of their scores just as
    far as gives the schedule's sparsity: the Lagrangian's step with its multiplier solved for.
    Nothing is moved while the gates are sparser than asked already. Units at 0 get gradients, and
    so may return.

    Args:
        allocator: turns multipliers into exportable shapes and masks.
        scores: one-shot importance of each unit, kind -> (N,).
        target: sparsity at which the scores are coldest.
        warm_start: start lower where the allocator, by the scores, removes a unit early; else at 1.
        solved: solve for the step; else penalise with the Lagrangian.
    """

    RATE = 0.25

    def __init__(
        self,
        allocator: Allocator,
        scores: Mapping[str, Tensor],
        target: float,
        warm_start: bool = True,
        solved: bool = True,
    ) -> None:
        stays = {
            kind: torch.ones_like(value, dtype=torch.float32) for kind, value in scores.items()
        }
        if warm_start:
            stays = survival(allocator, scores, target)
        first = {kind: deterministic.start(value) for kind, value in stays.items()}
        super().__init__(allocator, scores, first, solved)
        self.target = target
        self._temperature = deterministic.HOT
        self._progress = 0.0
        parameters = {kind: unit_parameters(allocator.budget, kind) for kind in scores}
        total = sum(float(value.sum()) for value in parameters.values())
        for kind, value in parameters.items():
            self.register_buffer(f"share_{kind}", value / total, persistent=False)

    @torch.no_grad()
    def begin_step(self, sparsity: float, seed: int) -> None:
        """Cool the scores and, where the schedule is solved, move multipliers to its sparsity."""
        if self.frozen:
            return
        self._asked = sparsity
        for value in self.trained.values():
            value.clamp_(min=0)
        # Cooled by what is really gone: saturated scores have no slope left to be pushed down.
        self._temperature = deterministic.COLD
        self._progress = min(1.0, float(self._expected()) / self.target)
        self._temperature = deterministic.temperature(self._progress)
        if self.lagrangian is None:
            self._move(sparsity)

    def _move(self, sparsity: float) -> None:
        """Find the least step that gives a sparsity, and make it."""
        before = {kind: value.clone() for kind, value in self.trained.items()}

        def enough(amount: float) -> bool:
            for kind, value in before.items():
                moved = deterministic.push(value, amount, self._temperature)
                self.trained[kind].copy_(moved)
            return float(self._expected()) >= sparsity

        if enough(0.0):
            return
        low, high = 1e-6, 1e-3
        while not enough(high) and high < 1e34:
            low, high = high, 16 * high
        for _ in range(40):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if enough(middle) else (middle, high)
        enough(high)

    def _keep(self) -> dict[str, Tensor]:
        return {
            k: deterministic.score(v, self._temperature) for k, v in self._multipliers().items()
        }

    def _multipliers(self) -> dict[str, Tensor]:
        # At exactly 0 the gradient of `clamp` still is 1: a unit that is gone may return.
        return {kind: value.clamp(min=0) for kind, value in self.trained.items()}

    def masks(self, batch_size: int) -> Masks:
        """Return the multipliers (N,), for the whole batch."""
        return self._final or Masks(self.allocator.layout, self._multipliers())

    def penalty(self) -> Tensor | None:
        """Return the share of parameters that is undecided, plus the Lagrangian term if any."""
        if self.frozen:
            return None
        parts = [
            (self.get_buffer(f"share_{kind}") * deterministic.undecided(score)).sum()
            for kind, score in self._keep().items()
        ]
        term = self._progress * torch.stack(parts).sum()
        lagrangian = super().penalty()
        return term if lagrangian is None else term + lagrangian

    @torch.no_grad()
    def snapshot(self) -> Masks:
        """Return the step's masks, which have no noise to leave out."""
        return self.masks(1).detach()

    @torch.no_grad()
    def freeze(self, sparsity: float) -> Masks:
        """Keep the units of highest multipliers in an exportable shape, with their values."""
        multipliers = self._multipliers()
        values = {k: v.clamp(min=deterministic.LEAST_KEPT) for k, v in multipliers.items()}
        return self._settle(multipliers, values, sparsity)


def survival(
    allocator: Allocator, scores: Mapping[str, Tensor], target: float
) -> dict[str, Tensor]:
    """Return how long each unit stays while sparsity grows: share (N,) of a ladder that keeps it.

    Args:
        allocator: decides what is kept at each rung.
        scores: kind -> (N,) losses.
        target: the middle of the ladder, which ends at twice of it or at the most that can go.
    """
    top = min(2 * target, 0.999 * allocator.maximum())
    kept = {kind: torch.zeros(value.shape) for kind, value in scores.items()}
    for rung in range(RUNGS):
        shape = allocator.shape(scores, top * (rung + 1) / RUNGS)
        for kind, mask in allocator.masks(shape, scores).values.items():
            kept[kind] += mask.cpu() / RUNGS
    return kept
