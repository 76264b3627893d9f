"""Plans of runs whose masks move: their kinds of steps, and how to run one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from nuteprune.distill.coforward import DENSE, Role
from nuteprune.gates.masks import Masks
from nuteprune.progressive.config import ProgressiveConfig
from nuteprune.progressive.teachers import Schedule, snapshots
from nuteprune.progressive.trainer import ProgressiveTrainer
from nuteprune.train.prepare import Prepared
from nuteprune.train.trainer import NutePruneTrainer

MOVING, TAUGHT, FIXED = "moving", "taught", "fixed"
"""Kinds of steps: masks move, or move while snapshots teach, or are fixed."""


def kinds_of_steps(args: ProgressiveConfig, sparsity: float) -> dict[str, int]:
    """Return kind -> its number of steps, on the way to a sparsity."""
    ramp = min(args.max_steps, _schedule(args, sparsity).freeze_step)
    found = {TAUGHT if snapshots_of(args, sparsity) else MOVING: ramp}
    return {k: v for k, v in (found | {FIXED: args.max_steps - ramp}).items() if v}


def snapshots_of(args: ProgressiveConfig, sparsity: float) -> float:
    """Return about how many snapshots there will be on the way to a sparsity."""
    schedule = _schedule(args, sparsity)
    has_snapshots = args.teacher == "snapshots" and schedule.ramps
    return has_snapshots * snapshots(sparsity, schedule.ramp_steps)


def _schedule(args: ProgressiveConfig, sparsity: float) -> Schedule:
    return Schedule(sparsity, args.max_steps, *args.shares)


def begin(trainer: NutePruneTrainer, masks: Masks) -> None:
    """Give a trainer the masks of a step at its target: these, if they are fixed from the start.

    Args:
        trainer: a `ProgressiveTrainer` that has not begun.
        masks: by chance.
    """
    assert isinstance(trainer, ProgressiveTrainer)
    if trainer.schedule.freeze_step == 0:
        trainer.gates.restore_masks(masks)
    trainer.gates.begin_step(trainer.goal.sparsity, trainer.args.seed)


class Planned(ProgressiveTrainer):
    """Runs a planned step, whose masks and teacher have no data if the model has none.

    Args:
        model: the model.
        args: the run's settings.
        kind: of the step.
        masks: by chance.
    """

    def __init__(self, model: Prepared, args: ProgressiveConfig, kind: str, masks: Masks) -> None:
        super().__init__(model, args)
        self._fixed, self._kind = masks, kind

    def student(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """See `ProgressiveTrainer.student`; each sequence has masks whose gradients are wanted."""
        if self._kind == FIXED:
            return self.coforward.student(self._fixed)
        count = len(inputs["input_ids"])
        values = {k: self._leaf(count, len(v)) for k, v in self._fixed.values.items()}
        return self.coforward.student(Masks(self._fixed.layout, values))

    def _leaf(self, *size: int) -> Tensor:
        weight = self.anatomy.embedding.weight
        leaf: Tensor = weight.new_ones(size, dtype=torch.float32).requires_grad_()
        return leaf

    def teacher(self) -> Role | None:
        """See `ProgressiveTrainer.teacher`."""
        if self.args.teacher == "none" or self._kind != TAUGHT:
            return None if self.args.teacher == "none" else DENSE
        dtype = self.anatomy.embedding.weight.dtype
        held = {k: torch.empty_like(v, dtype=dtype) for k, v in self.ready.bank.state().items()}
        return Role(self._fixed, held)

    def penalty(self) -> Tensor | None:
        """Return no penalty: it costs little, and would need gates with data."""
        return None
