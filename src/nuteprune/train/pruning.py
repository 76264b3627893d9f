"""How far a run has come: what each step begins and ends with, and what is kept on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nuteprune.distill.teachers import Role
from nuteprune.gates.gate_types import GATE_TYPES
from nuteprune.gates.masks import Masks
from nuteprune.model.packed import is_packed
from nuteprune.processes import agree
from nuteprune.shrink.compensate import InstallStack, install_in_place, install_lora, trying_out
from nuteprune.train.bad_steps import BadSteps
from nuteprune.train.calibration import Progress, refit_on, score_in_rounds
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.prepare import Prepared
from nuteprune.train.setup import make_gates
from nuteprune.train.state import RunState, restore


class Pruning:
    """The method's way through a run: scores, masks of each step, teachers, targets.

    Args:
        ready: the prepared model.
        args: the run's settings.
        text: gives the training text.
        progress: told about scoring and re-fit.
    """

    def __init__(
        self, ready: Prepared, args: NutePruneConfig, text: Callable[[], Any], progress: Progress
    ) -> None:
        self.ready, self.args = ready, args
        self._text, self._progress = text, progress
        self.gates, self.teachers, self.bank = ready.gates, ready.teachers, ready.coforward.bank
        self.bad_steps = BadSteps(args.device)
        self.step = -1
        self.teacher_index = -1
        self.reached: list[int] = []
        self.first_scores: dict[str, Tensor] = {}
        self.warm = False

    # -- before the first step

    def warm_start(self) -> None:
        """Score all units on calibration text and start the gates from the scores."""
        ready, args = self.ready, self.args
        if GATE_TYPES[args.gate_type].ranked:
            scores = score_in_rounds(
                self._text(),
                args,
                ready.anatomy,
                ready.hooks,
                ready.allocator,
                ready.targets[-1],
                partial(trying_out, self.bank),
                self._progress,
                self.bank.as_dense,
            )
            fresh = make_gates(ready.allocator, scores, args)
            self.gates.load_state_dict(fresh.state_dict())
            agree(self.gates.state_dict().values())
        self.first_scores = {k: v.cpu().clone() for k, v in self.gates.scores.items()}
        self.warm = True

    # -- a step

    def begin_step(self, step: int) -> None:
        """Prepare masks and teacher of an optimizer step.

        Args:
            step: counted from 0; nothing happens where it has begun.
        """
        if step == self.step:
            return
        self.step, schedule = step, self.ready.schedule
        stage = schedule.stage(step)
        if step == stage.first or step < stage.freeze_step:
            self.gates.thaw()
        if step >= stage.freeze_step and not self.gates.frozen:
            self.freeze(stage.target)
        seed = (self.args.seed * 1_000_003 + step) % 2**32  # of more bits torch uses the last 32
        self.gates.begin_step(schedule.sparsity(step), seed)
        self.teacher_index = self.ready.plan.teacher(stage, step, len(self.teachers))

    def read_teacher(self) -> Role | None:
        """Return the step's teacher, on the run's device and in its dtype; None without any."""
        if self.ready.plan.kind == "none":
            return None
        dtype = self.ready.anatomy.embedding.weight.dtype
        return self.teachers.role(self.teacher_index, str(self.args.device), dtype)

    def end_step(self) -> None:
        """Finish an optimizer step: scores follow, and a snapshot is taken where one is due."""
        self.gates.end_step()
        at_target = self._ends_target()
        if at_target and not self.gates.frozen:
            self.freeze(self.ready.schedule.stage(self.step).target)
        sparsity = self.gates.sparsity()
        moving = not self.gates.frozen
        if at_target:
            self._record_target()
        elif moving and self.ready.plan.due(sparsity, self.teachers.newest):
            self._record_teacher(torch.bfloat16)

    def _ends_target(self) -> bool:
        """Return whether the step is the last one of a target before the last."""
        if self.step < 0:
            return False
        stage = self.ready.schedule.stage(self.step)
        return self.step + 1 == stage.end and stage.target < self.ready.targets[-1]

    def _record_target(self) -> None:
        """Keep the model of a target that is reached: nothing of what is written is rounded."""
        self.reached.append(len(self.teachers))
        self._record_teacher(torch.float32)

    def _record_teacher(self, dtype: torch.dtype) -> None:
        self.teachers.record(self.gates.sparsity(), self.gates.snapshot(), self.bank.state(), dtype)

    def freeze(self, target: float) -> None:
        """Fix the masks, and re-fit the weights that stay where that is asked for."""
        masks = self.gates.freeze(self.ready.target(target).goal)
        if not self.args.compensation:
            return
        bank, anatomy, args = self.bank, self.ready.anatomy, self.args
        install = install_in_place(bank, anatomy)
        stacks: InstallStack | None = bank.set_weight
        if args.sharded or is_packed(anatomy.model):  # no place for whole weights there
            install, stacks = install_lora(bank, anatomy, args.lora_rank), None
        text, hooks, tell, dense = self._text(), self.ready.hooks, self._progress, bank.as_dense
        refit_on(text, args, anatomy, hooks, masks, install, tell, dense, stacks)
        agree(bank.state().values())

    def figures(self) -> dict[str, float]:
        """Return what a step's line in the logs says of the method."""
        return {
            **self.gates.figures(),
            "sparsity": self.gates.sparsity(),
            "target": self.ready.schedule.sparsity(self.step),
            "teacher": self.teacher_index,
            "teachers": len(self.ready.met),
            "bad_steps": self.bad_steps.total,
        }

    # -- without steps, and after the last

    def pass_targets(self) -> None:
        """Keep the models of all targets but the last, of a run without steps."""
        for target in self.ready.targets[len(self.reached) : -1]:
            self.freeze(target)
            self._record_target()
            self.gates.thaw()
            self.bank.clear()

    def settle(self) -> None:
        """Fix the masks at the last target, if training has not led to that."""
        on_the_way = len(self.reached) < len(self.ready.targets) - 1
        if on_the_way or self._ends_target():
            self.gates.thaw()
        if not self.gates.frozen:
            self.freeze(self.ready.targets[-1])

    # -- in checkpoints

    def state(self) -> RunState:
        """Return what the run has learned and decided."""
        return RunState(
            lora=self.bank.state(),
            gates=self.gates.state_dict(),
            masks=self.gates.snapshot().values,
            frozen=self.gates.frozen,
            first_scores=self.first_scores,
            teachers=self.teachers.sparsities,
            sums=self.teachers.sums,
            reached=self.reached,
            bad_steps=[self.bad_steps.total, self.bad_steps.in_row],
        )

    def take(self, state: RunState) -> None:
        """Go back to what a run had learned and decided."""
        self.step = -1
        self.gates.thaw()  # of what this trainer has done itself, nothing counts
        self.bank.load(state.lora)
        restore(self.gates.state_dict(), state.gates, "gates")
        if state.frozen:
            self.gates.restore_masks(Masks(self.ready.allocator.layout, state.masks))
        self.teachers.restore(state.teachers, state.sums)
        self.reached, self.first_scores = state.reached, state.first_scores
        self.bad_steps.restore(*state.bad_steps)
        self.warm = True
