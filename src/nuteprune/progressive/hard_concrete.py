"""The paper's gates: hard-concrete (Louizos, Welling and Kingma 2018, arXiv 1712.01312).

A gate is a sigmoid of log-alpha plus logistic noise, stretched beyond [0, 1] and clipped, so that
it is exactly 0 or 1 with positive probability and differentiable in between. A Lagrangian drives
expected sparsity along the schedule. In the end the units of highest probability stay, in an
exportable shape at exactly the target, with the soft values that they were trained with.

Shape suffix: N units of one kind in the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from nuteprune.gates.allocate import Allocator
from nuteprune.gates.costs import Goal
from nuteprune.gates.masks import Masks
from nuteprune.gates.scores import losses_of
from nuteprune.progressive.gates import Gates

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
TEMPERATURE = 2 / 3
LOG_ALPHA_MIN, LOG_ALPHA_MAX = math.log(0.01), math.log(100)
SHARPNESS = 0.8
"""Factor on log-alpha at test time, as in the authors' code."""
START = {"neurons": math.log(0.99 / 0.01)}
"""Kind -> log-alpha before the first step; other kinds start at `LOG_ALPHA_MAX`. As published."""
LEARNING_RATE = 0.1
"""Rate of log-alpha and of the Lagrangian's multipliers, as published."""


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


class HardConcreteGates(Gates):
    """Soft masks drawn anew at each step, with log-alpha trained by gradients.

    Args:
        allocator: turns keep probabilities into exportable shapes and masks.
        scores: names the kinds and their units, kind -> (N,); the start is the published one.
    """

    ranked, trained = False, True

    def __init__(self, allocator: Allocator, scores: Mapping[str, Tensor]) -> None:
        super().__init__(allocator, scores)
        first = {k: torch.full_like(v, START.get(k, LOG_ALPHA_MAX)) for k, v in scores.items()}
        self.log_alpha = nn.ParameterDict({k: nn.Parameter(v) for k, v in first.items()})
        self.lagrangian = Lagrangian()
        self._asked = 0.0
        self._noise: dict[str, Tensor] = {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return a group for log-alpha, and one for the Lagrangian's multipliers, which ascend."""
        shared = {"lr": LEARNING_RATE, "weight_decay": 0.0}
        return [
            {"params": list(self.log_alpha.parameters()), **shared},
            {"params": list(self.lagrangian.parameters()), "maximize": True, **shared},
        ]

    def begin_step(self, sparsity: float, seed: int) -> None:
        """Draw the step's noise."""
        if self.frozen:
            return
        self._asked = sparsity
        generator = torch.Generator().manual_seed(seed)
        for kind, value in self.log_alpha.items():
            value.data.clamp_(LOG_ALPHA_MIN, LOG_ALPHA_MAX)
            noise = torch.rand(value.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
            self._noise[kind] = noise.to(value.device)

    def masks(self, batch_size: int) -> Masks:
        """Return one draw (N,) for the whole batch."""
        if self._final is not None:
            return self._final
        drawn = {k: sample(v, self._noise[k]) for k, v in self.log_alpha.items()}
        return Masks(self.allocator.layout, drawn)

    def _expected(self) -> Tensor:
        keep = {k: keep_probability(v) for k, v in self.log_alpha.items()}
        return self.allocator.budget.expected_sparsity(Masks(self.allocator.layout, keep))

    def penalty(self) -> Tensor | None:
        """Return the Lagrangian term at the step's expected sparsity, None once frozen."""
        if self.frozen:
            return None
        return cast(Tensor, self.lagrangian(self._expected(), self._asked))

    def figures(self) -> dict[str, float]:
        """Return the Lagrangian's multipliers."""
        return {name: float(value.detach()) for name, value in self.lagrangian.named_parameters()}

    @torch.no_grad()
    def sparsity(self) -> float:
        """Return the expected sparsity, that of the final masks once frozen."""
        if self._final is not None:
            return self.allocator.sparsity(self._final)
        return float(self._expected())

    @torch.no_grad()
    def snapshot(self) -> Masks:
        """Return noiseless soft masks: of each layer and kind the lowest size - E[kept] are 0."""
        if self._final is not None:
            return self._final
        values = {}
        for kind, value in self.log_alpha.items():
            soft, sizes = test_value(value), self.allocator.layout.sizes[kind]
            for part, x in zip(soft.split(sizes), value.split(sizes), strict=True):
                gone = round(len(x) - float(keep_probability(x).sum()))
                part[torch.argsort(part, stable=True)[:gone]] = 0
            values[kind] = soft
        return Masks(self.allocator.layout, values)

    @torch.no_grad()
    def freeze(self, asked: float | Goal) -> Masks:
        """Keep the units of highest probability in an exportable shape, with their soft values."""
        keep = {k: keep_probability(v) for k, v in self.log_alpha.items()}
        for kind, loss in losses_of(self.allocator.budget, keep).items():
            self.scores[kind].copy_(loss)
        shape = self.allocator.shape(self.scores, asked)
        hard = self.allocator.masks(shape, self.scores).values
        soft = {k: hard[k].to(v) * test_value(v) for k, v in self.log_alpha.items()}
        self._final = Masks(self.allocator.layout, soft)
        return self._final
