"""Plans of runs whose masks move: their kinds of steps, and how to run one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from nuteprune.distill.coforward import DENSE, Role
from nuteprune.gates.masks import Masks
from nuteprune.progressive.config import ProgressiveConfig
from nuteprune.progressive.trainer import ProgressiveTrainer
from nuteprune.train.prepare import Prepared
from nuteprune.train.trainer import NutePruneTrainer

MOVING, TAUGHT, FIXED = "moving", "taught", "fixed"
"""Kinds of steps: masks move, or move while snapshots teach, or are fixed."""


def kinds_of_steps(args: ProgressiveConfig, sparsity: float) -> dict[str, int]:
    """Return kind -> its number of steps, on the way to a sparsity."""
    schedule = args.schedule(sparsity)
    ramp = min(args.max_steps, schedule.freeze_step)
    found = {TAUGHT if schedule.has_snapshots else MOVING: ramp}
    return {k: v for k, v in (found | {FIXED: args.max_steps - ramp}).items() if v}


def begin(trainer: NutePruneTrainer, masks: Masks) -> None:
    """Give a trainer the masks of a step at its target: these, if they are fixed from the start.

    Args:
        trainer: a `ProgressiveTrainer` that has not begun.
        masks: by chance.
    """
    assert isinstance(trainer, ProgressiveTrainer)
    if trainer.schedule.freeze_step == 0:
        trainer.gates.restore_masks(masks)
    trainer.gates.begin_step(trainer.target.sparsity, trainer.args.seed)


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
        weight, values = self.anatomy.embedding.weight, {}
        for kind, fixed_N in self._fixed.values.items():
            leaf_BN = weight.new_ones(count, len(fixed_N), dtype=torch.float32)
            values[kind] = leaf_BN.requires_grad_()
        return self.coforward.student(Masks(self._fixed.layout, values))

    def teacher(self) -> Role | None:
        """See `ProgressiveTrainer.teacher`."""
        if self.args.teacher == "none":
            return None
        if self._kind != TAUGHT:
            return DENSE
        dtype = self.anatomy.embedding.weight.dtype
        held = {k: torch.empty_like(v, dtype=dtype) for k, v in self.prepared.bank.state().items()}
        return Role(self._fixed, held)

    def penalty(self) -> Tensor | None:
        """Return no penalty: it costs little, and would need gates with data."""
        return None
