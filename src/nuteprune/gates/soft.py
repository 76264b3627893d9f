"""Gates whose masks are soft and trained by gradients: what they share, and hard-concrete ones.

Sparsity follows the schedule by a Lagrangian, as published, or is solved for at each step. In the
end the units of highest score stay, in an exportable shape at exactly the target, with the soft
values that they were trained with.

Shape suffix: N units of one kind in the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from nuteprune.gates import hard_concrete
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.gates import Gates, sparsity_of
from nuteprune.gates.masks import Masks
from nuteprune.gates.schedule import Lagrangian
from nuteprune.gates.units import losses_of


class SoftGates(Gates):
    """What soft gates have in common.

    Args:
        allocator: turns scores into exportable shapes and masks.
        scores: one-shot importance of each unit, kind -> (N,).
        trained: the first values of what is trained, kind -> (N,).
        solved: solve for the schedule's sparsity at each step; else the Lagrangian.
    """

    RATE = 1.0
    """Rate of what is trained, as a share of the rate that is set."""

    def __init__(
        self,
        allocator: Allocator,
        scores: Mapping[str, Tensor],
        trained: Mapping[str, Tensor],
        solved: bool,
    ) -> None:
        super().__init__(allocator, scores)
        self.trained = nn.ParameterDict({k: nn.Parameter(v) for k, v in trained.items()})
        self.lagrangian = None if solved else Lagrangian()
        self._asked = 0.0
        self._final: Masks | None = None

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """Return a group for the gates, and one for the Lagrangian's multipliers, which ascend."""
        groups: list[dict[str, Any]] = [
            {"params": list(self.trained.parameters()), "lr": rate * self.RATE, "weight_decay": 0.0}
        ]
        if self.lagrangian is not None:
            ascending = list(self.lagrangian.parameters())
            groups.append({"params": ascending, "lr": rate, "maximize": True, "weight_decay": 0.0})
        return groups

    def _keep(self) -> dict[str, Tensor]:
        """Return how much each unit (N,) counts as kept, in [0, 1], with gradients."""
        raise NotImplementedError

    def _expected(self) -> Tensor:
        return self.allocator.budget.expected_sparsity(Masks(self.allocator.layout, self._keep()))

    def penalty(self) -> Tensor | None:
        """Return the Lagrangian term at the step's expected sparsity."""
        if self.lagrangian is None or self.frozen:
            return None
        return cast(Tensor, self.lagrangian(self._expected(), self._asked))

    def figures(self) -> dict[str, float]:
        """Return the Lagrangian's multipliers, where it drives the gates."""
        if self.lagrangian is None:
            return {}
        return {name: float(value.detach()) for name, value in self.lagrangian.named_parameters()}

    def sparsity(self) -> float:
        """Return the expected sparsity, that of the final masks once frozen."""
        if self._final is not None:
            return sparsity_of(self.allocator, self._final)
        with torch.no_grad():
            return float(self._expected())

    def _settle(
        self, keep: Mapping[str, Tensor], values: Mapping[str, Tensor], sparsity: float
    ) -> Masks:
        """Keep the units that count most, at a sparsity, with given values."""
        for kind, loss in losses_of(self.allocator.budget, keep).items():
            self.scores[kind].copy_(loss)
        shape = self.allocator.shape(self.scores, sparsity)
        hard = self.allocator.masks(shape, self.scores).values
        soft = {kind: hard[kind].to(value) * value for kind, value in values.items()}
        self._final = Masks(self.allocator.layout, soft)
        self.frozen = True
        return self._final

    def thaw(self) -> None:
        """Let masks move again, towards the next target."""
        super().thaw()
        self._final = None

    def restore_masks(self, masks: Masks) -> None:
        """Take over frozen masks."""
        self._final = masks.to(next(iter(self.scores.values())).device)
        self.frozen = True


class HardConcreteGates(SoftGates):
    """The paper's gates: soft masks drawn anew each step, log-alpha trained by gradients.

    With `solved`, expected sparsity follows the schedule exactly: all log-alpha are shifted by one
    constant that is solved for at each step, and gradients only decide which units go. Without,
    the Lagrangian drives log-alpha itself.

    Args:
        allocator: turns keep probabilities into exportable shapes and masks.
        scores: one-shot importance of each unit, kind -> (N,).
        warm_start: start log-alpha from the scores' ranks; else open, at the published values.
        solved: solve for the shift; else penalise with the Lagrangian.
    """

    def __init__(
        self,
        allocator: Allocator,
        scores: Mapping[str, Tensor],
        warm_start: bool = True,
        solved: bool = True,
    ) -> None:
        first = {kind: _log_alpha(kind, value, warm_start) for kind, value in scores.items()}
        super().__init__(allocator, scores, first, solved)
        self._shift = 0.0
        self._noise: dict[str, Tensor] = {}

    def begin_step(self, sparsity: float, seed: int) -> None:
        """Draw the step's noise and, where the schedule is solved, find the shift."""
        if self.frozen:
            return
        self._asked = sparsity
        generator = torch.Generator().manual_seed(seed)
        for kind, value in self.trained.items():
            value.data.clamp_(hard_concrete.LOG_ALPHA_MIN, hard_concrete.LOG_ALPHA_MAX)
            noise = torch.rand(value.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
            self._noise[kind] = noise.to(value.device)
        self._shift = self._solve(sparsity) if self.lagrangian is None else 0.0

    @torch.no_grad()
    def _solve(self, sparsity: float) -> float:
        low, high = -20.0, 20.0
        for _ in range(40):
            self._shift = (low + high) / 2
            if float(self._expected()) > sparsity:
                low = self._shift
            else:
                high = self._shift
        return (low + high) / 2

    def _shifted(self) -> dict[str, Tensor]:
        return {kind: value + self._shift for kind, value in self.trained.items()}

    def _keep(self) -> dict[str, Tensor]:
        return {k: hard_concrete.keep_probability(v) for k, v in self._shifted().items()}

    def masks(self, batch_size: int) -> Masks:
        """Return one draw (N,) for the whole batch."""
        if self._final is not None:
            return self._final
        drawn = {k: hard_concrete.sample(v, self._noise[k]) for k, v in self._shifted().items()}
        return Masks(self.allocator.layout, drawn)

    @torch.no_grad()
    def snapshot(self) -> Masks:
        """Return noiseless soft masks: the lowest round(size - E[kept]) of each kind are 0."""
        if self._final is not None:
            return self._final
        values = {}
        for kind, value in self._shifted().items():
            soft = hard_concrete.test_value(value)
            gone = round(len(value) - float(hard_concrete.keep_probability(value).sum()))
            soft[torch.argsort(soft, stable=True)[:gone]] = 0
            values[kind] = soft
        return Masks(self.allocator.layout, values)

    @torch.no_grad()
    def freeze(self, sparsity: float) -> Masks:
        """Keep the units of highest probability in an exportable shape, with their soft values."""
        self._shift = self._solve(sparsity)
        values = {k: hard_concrete.test_value(v) for k, v in self._shifted().items()}
        return self._settle(self._keep(), values, sparsity)


def _log_alpha(kind: str, scores: Tensor, warm: bool) -> Tensor:
    """Return the first log-alpha (N,) of a kind."""
    if not warm:
        top = hard_concrete.LOG_ALPHA_MAX
        start = top if kind != "neurons" else float(torch.logit(torch.tensor(0.99)))
        return torch.full(scores.shape, min(10.0, start))
    ranks = scores.argsort(stable=True).argsort(stable=True).float() / max(1, len(scores) - 1)
    return hard_concrete.LOG_ALPHA_MAX * (0.25 + 0.75 * ranks)
