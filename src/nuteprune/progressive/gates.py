"""Gates in training: from learned state to the masks of a step, and to the final ones.

`RankedGates` hold hard, exportable masks at the scheduled sparsity at every step and keep
re-estimating each unit's score from the gradients of its mask.

`HardConcreteGates` are the paper's (Louizos, Welling and Kingma 2018, arXiv 1712.01312). A gate is
a sigmoid of log-alpha plus logistic noise, stretched beyond [0, 1] and clipped, so that it is
exactly 0 or 1 with positive probability and differentiable in between. A Lagrangian drives expected
sparsity along the schedule. In the end the units of highest probability stay, in an exportable
shape at exactly the target, with the soft values that they were trained with.

Shape suffixes: B batch, N units of one kind in the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from nuteprune.gates.allocate import Allocator
from nuteprune.gates.costs import Goal
from nuteprune.gates.masks import Masks
from nuteprune.gates.scores import losses_of
from nuteprune.processes import everyone

DECAY = 0.99
"""Weight of the past in the moving average of scores, per step."""
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
TEMPERATURE = 2 / 3
LOG_ALPHA_MIN, LOG_ALPHA_MAX = math.log(0.01), math.log(100)
SHARPNESS = 0.8
"""Factor on log-alpha at test time, as in the authors' code."""
START = {"neurons": math.log(0.99 / 0.01)}
"""Kind -> log-alpha before the first step; other kinds start at `LOG_ALPHA_MAX`. As published."""
LEARNING_RATE = 0.1
"""Rate of log-alpha and of the Lagrangian's multipliers, as published."""


class Gates(nn.Module):
    """What all kinds of gates have in common; `RankedGates` has the methods of each kind.

    Args:
        allocator: turns scores into exportable shapes and masks.
        scores: one-shot importance of each unit, kind -> (N,); the warm start.
    """

    ranked: ClassVar[bool]
    """Whether masks follow one-shot scores; else all units start alike."""
    trained: ClassVar[bool]
    """Whether the optimizer trains them: then they need steps to learn in, and an optimizer that
    can ascend for the Lagrangian's multipliers."""

    def __init__(self, allocator: Allocator, scores: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.allocator = allocator
        self.kinds = tuple(scores)
        for kind, value in scores.items():
            self.register_buffer(f"scores_{kind}", value.float().clone())
        self._final: Masks | None = None

    @property
    def frozen(self) -> bool:
        """Whether masks are fixed."""
        return self._final is not None

    @property
    def scores(self) -> dict[str, Tensor]:
        """Loss that removing each unit is expected to cost, kind -> (N,)."""
        return {kind: self.get_buffer(f"scores_{kind}") for kind in self.kinds}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups for trained gates."""
        return []

    def observe(self) -> None:
        """Add the gradients of gates from a micro-batch's backward pass."""

    def end_step(self) -> None:
        """Finish an optimizer step."""

    def penalty(self) -> Tensor | None:
        """Return the sparsity term of the loss, None if there is none."""
        return None

    def figures(self) -> dict[str, float]:
        """Return further figures for the logs."""
        return {}

    def restore_masks(self, masks: Masks) -> None:
        """Take over masks that were frozen before a run was interrupted."""
        self._final = masks.to(next(iter(self.scores.values())).device)


class RankedGates(Gates):
    """Hard masks at the scheduled sparsity; scores follow the gradients of the masks.

    The score of unit u is the diagonal Fisher information of its mask, sum over sequences of
    (d loss / d mask_u)^2, first from the warm start, then as a moving average over training steps.
    Removed units get gradients too, and so may return; experts do not, since no token is sent to
    one that is gone.

    Args:
        allocator: turns scores into exportable shapes and masks.
        scores: one-shot importance of each unit, kind -> (N,); the warm start.
        decay: weight of the past in the moving average, per step.
    """

    ranked, trained = True, False

    def __init__(
        self, allocator: Allocator, scores: Mapping[str, Tensor], decay: float = DECAY
    ) -> None:
        super().__init__(allocator, scores)
        self.decay = decay
        self._hard = Masks.open(allocator.layout, self.kinds)
        self._leaves: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}
        self._sparsity = 0.0

    def begin_step(self, sparsity: float, seed: int) -> None:
        """Choose the step's hard masks by the current scores."""
        if not self.frozen:
            self._choose(sparsity)

    def _choose(self, asked: float | Goal) -> None:
        shape = self.allocator.shape(self.scores, asked)
        device = next(iter(self.scores.values())).device
        self._hard = self.allocator.masks(shape, self.scores).to(device)
        self._sparsity = self.allocator.budget.sparsity(shape)

    def masks(self, batch_size: int) -> Masks:
        """Return masks (B, N), one row per sequence, so that gradients come per sequence."""
        if self._final is not None:
            return self._final
        self._leaves = {
            kind: torch.zeros(batch_size, len(value), device=value.device, requires_grad=True)
            for kind, value in self._hard.values.items()
        }
        values = {kind: self._hard.values[kind] + leaf for kind, leaf in self._leaves.items()}
        return Masks(self.allocator.layout, values)

    def observe(self) -> None:
        """Add up squared per-sequence gradients."""
        for kind, leaf in self._leaves.items():
            if leaf.grad is not None:
                squared = leaf.grad.float().square().sum(0)
                self._seen[kind] = self._seen[kind] + squared if kind in self._seen else squared
        self._leaves = {}

    def end_step(self) -> None:
        """Move the scores towards those of the step, on the scores' own scale."""
        if self._seen and not self.frozen:
            everyone().add_up(self._seen[kind] for kind in self.kinds)
            seen = sum(float(v.sum()) for v in self._seen.values())
            have = sum(float(v.sum()) for v in self.scores.values())
            if 0 < seen < math.inf:  # squares overflow where gradients do not yet
                for kind, value in self.scores.items():
                    value.lerp_(self._seen[kind] * (have / seen), 1 - self.decay)
        self._seen = {}

    def sparsity(self) -> float:
        """Return the exact sparsity of the step's masks."""
        return self.allocator.sparsity(self._final) if self._final is not None else self._sparsity

    def snapshot(self) -> Masks:
        """Return the step's hard masks."""
        return self._final or self._hard

    def freeze(self, asked: float | Goal) -> Masks:
        """Fix the masks by the current scores."""
        self._choose(asked)
        self._final = self._hard
        return self._hard


# -- the paper's


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
