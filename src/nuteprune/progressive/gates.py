"""Gates in training: from learned state to the masks of a step, and to the final ones.

`RankedGates` hold hard, exportable masks at the scheduled sparsity
at every step and keep re-estimating each unit's score from the gradients of its mask. The paper's,
whose masks are soft and trained themselves, are in `hard_concrete.py`.

Shape suffixes: B batch, N units of one kind in the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nuteprune.gates.allocate import Allocator
from nuteprune.gates.costs import Goal
from nuteprune.gates.masks import Masks
from nuteprune.processes import everyone

DECAY = 0.99
"""Weight of the past in the moving average of scores, per step."""


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
