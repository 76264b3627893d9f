"""ProgressiveTrainer: masks move while the student learns, and earlier snapshots of it teach.

A step: gates give the masks of the moment, an earlier snapshot of masks and LoRA or the dense model
teaches, and the gates follow their gradients. At the end of the ramp masks are fixed.
Source: the paper (arXiv 2402.09773), sections 3.2 and 3.3.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nuteprune.distill.coforward import Role
from nuteprune.errors import UserError
from nuteprune.gates.masks import Masks
from nuteprune.model.trainable import leave_out
from nuteprune.processes import agree
from nuteprune.progressive.config import GATE_TYPES, ProgressiveConfig
from nuteprune.progressive.teachers import Teachers
from nuteprune.run import Record, Run
from nuteprune.run_folder import TEACHERS
from nuteprune.stages.refit import refit
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.first_stages import calibration_blocks
from nuteprune.train.prepare import Prepared
from nuteprune.train.state import RunState
from nuteprune.train.trainer import NutePruneTrainer

FAR = 0.05
"""Sparsity that masks may lack when they are frozen. More goes at once then, with no step to learn
which units that should be."""
logger = logging.getLogger(__name__)


class ProgressiveTrainer(NutePruneTrainer):
    """Prunes a causal language model while it learns from less pruned versions of itself.

    Arguments and errors are those of `NutePruneTrainer`; masks and weights are found on the way.
    """

    args: ProgressiveConfig

    def add_to(self, prepared: Prepared, args: NutePruneConfig) -> None:
        """Add gates to the model, and plan when they move and who teaches."""
        assert isinstance(args, ProgressiveConfig)
        self.schedule = args.schedule(self.target.sparsity)
        kind, allocator = GATE_TYPES[args.gate_type], prepared.allocator
        # Trainer leaves models in 8 or 4 bits where they are, and what hangs on them too.
        self.gates = kind(allocator, allocator.equal_scores()).to(args.device)
        prepared.model.add_module("nuteprune_gates", self.gates)
        leave_out(prepared.model)
        self._teacher_index, self._has_scores = -1, False
        folder = Path(cast(str, args.output_dir)) / TEACHERS  # `begin` has the target's own
        self.teachers = Teachers(folder, prepared.layout, keep=args.device.type != "cpu")

    def begin(self, resumes: bool = False) -> None:
        """Start the gates from scores, where they follow any."""
        self.teachers.folder = self.run_folder / TEACHERS
        if self._has_scores or resumes or not self.gates.ranked:
            return
        scores = self.first_stages(resumes).score()
        for kind, own in self.gates.scores.items():
            own.copy_(scores[kind])
        agree(self.gates.scores.values())
        self._has_scores = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See `NutePruneTrainer.create_optimizer`.

        Raises:
            UserError: if some parameters have to ascend, and the optimizer knows no `maximize`.
        """
        optimizer = super().create_optimizer(model)
        if self.gates.trained and "maximize" not in optimizer.defaults:
            raise UserError(
                f"the Lagrangian's multipliers ascend, which {type(optimizer).__name__} cannot do: "
                "pass an optimizer that has maximize"
            )
        return optimizer

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups for LoRA and for trained gates."""
        return [*super().parameter_groups(), *self.gates.parameter_groups()]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Make the schedule of LoRA's rate; trained gates have a constant rate.

        This follows the authors' code: else the multipliers slow down while sparsity still rises.
        """
        made = self.lr_scheduler is None
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if made and isinstance(schedule, LambdaLR):
            own = set(self.gates.parameters())
            for i, group in enumerate(schedule.optimizer.param_groups):
                if own.intersection(group["params"]):
                    schedule.lr_lambdas[i] = lambda _: 1.0
                    group["lr"] = group["initial_lr"]  # the first step's is set already
        return schedule

    # -- a step

    def begin_step(self, step: int) -> None:
        """Prepare masks and teacher of an optimizer step."""
        if step >= self.schedule.freeze_step and not self.gates.frozen:
            self.freeze()
        seed = (self.args.seed * 1_000_003 + step) % 2**32  # of more bits torch uses the last 32
        self.gates.begin_step(self.schedule.sparsity(step), seed)
        self._teacher_index = self.schedule.teacher(step, len(self.teachers))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Run one micro-batch; the gates see its gradients."""
        loss = super().training_step(model, inputs, *args)
        self.gates.observe()
        return loss

    def student(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Return a context in which the model is the step's student, forward and backward.

        Args:
            inputs: the micro-batch; each of its sequences may have masks of its own.
        """
        return self.coforward.student(self.gates.masks(len(inputs["input_ids"])))

    def teacher(self) -> Role | None:
        """Return the step's teacher, on the run's device and in its dtype; None without any."""
        if self.args.teacher == "none":
            return None
        dtype = self.anatomy.embedding.weight.dtype
        return self.teachers.role(self._teacher_index, str(self.args.device), dtype)

    def penalty(self) -> Tensor | None:
        """Return the Lagrangian's term; None where there is none."""
        return self.gates.penalty()

    def end_step(self) -> None:
        """Finish an optimizer step: scores follow, and a snapshot is taken where one is due."""
        self.gates.end_step()
        sparsity = self.gates.sparsity()
        if not self.gates.frozen and self.schedule.due(sparsity, self.teachers.newest):
            self.teachers.record(sparsity, self.gates.snapshot(), self.prepared.bank.state())

    def freeze(self) -> None:
        """Fix the masks, and refit the weights that stay where that is asked for."""
        args, expected, asked = self.args, self.gates.sparsity(), self.target.sparsity
        if self._step >= 0 and expected < asked - FAR:
            logger.warning(
                f"learned masks were frozen where they expected to cut {expected:.1%}, not "
                f"{asked:.1%}: quality suffers; more --steps let them get there"
            )
        masks = self.gates.freeze(self.target.goal)
        if args.refit:
            blocks = calibration_blocks(self.train_dataset, args.refit_blocks)
            rank, progress = args.lora_rank, self._progress
            weights = refit(self.prepared, masks, blocks, rank=rank, progress=progress)
            if not self.prepared.is_sharded:
                agree(weights.values())
            self.prepared.bank.install(weights)

    def as_pruned(self) -> AbstractContextManager[None]:
        """Return a context in which `model` uses the current masks; outside of it, none."""
        self.check_unused()
        return self.coforward.student(self.final_masks().to(str(self.args.device)))

    def sparsity(self) -> float:
        """Return the expected sparsity of the step's masks."""
        return self.gates.sparsity()

    def figures(self) -> dict[str, float]:
        """Return the method's figures for a step's line in the logs."""
        return {
            **self.gates.figures(),
            **super().figures(),
            "target": self.schedule.sparsity(self._step),
            "teacher": self._teacher_index,
            "teachers": len(self.teachers),
        }

    def manner(self) -> str:
        """Return a line that describes the training, printed before it begins."""
        teacher = "dense" if self.args.teacher == "snapshots" else self.args.teacher
        teacher = "snapshots" if self.schedule.has_snapshots else teacher
        return f"masks freeze at step {self.schedule.freeze_step}; teacher: {teacher}; "

    def note(self, logs: Mapping[str, Any]) -> str:
        """Return the note to show beside the progress bar, from a step's logs."""
        index = int(logs["teacher"])
        teacher = "dense" if index < 0 else f"{self.teachers.sparsities[index]:.1%}"
        return f"{super().note(logs)}  sparsity {logs['sparsity']:.1%}  teacher {teacher}"

    # -- checkpoints of a run, and its end

    def run_state(self) -> RunState:
        """Return the state of the run: LoRA, gates, masks, teachers and scores."""
        tensors = {
            "lora": self.prepared.bank.state(),
            "gates": self.gates.state_dict(),
            "masks": self.gates.snapshot().values,
        }
        teachers = {"teachers": self.teachers.sparsities, "sums": self.teachers.sums}
        notes = {"frozen": self.gates.frozen, "bad_steps": self.bad_steps.read(), **teachers}
        return RunState(tensors, notes)

    def take_state(self, state: RunState) -> None:
        """Restore LoRA, masks, gates, teachers and scores of an earlier state."""
        self._step = -1
        self.prepared.bank.load(state.lora)
        try:
            self.gates.load_state_dict(state.tensors["gates"])
        except RuntimeError as error:
            raise UserError(
                "cannot resume: the checkpoint's gates are not those of this model and these "
                "settings; resume with the run's own settings, or start anew with --overwrite"
            ) from error
        if state.notes["frozen"]:
            self.gates.restore_masks(Masks(self.prepared.layout, state.tensors["masks"]))
        self.teachers.restore(state.notes["teachers"], state.notes["sums"])
        self.bad_steps.restore(state.notes["bad_steps"])
        self._has_scores = True

    def settle(self) -> None:
        """Fix the masks if training has not."""
        super().settle()
        if not self.gates.frozen:
            self.freeze()

    def final_masks(self) -> Masks:
        """Return the masks of the moment, by which the model is cut in the end."""
        return self.gates.snapshot()

    def teachers_met(self) -> list[float]:
        """Return the sparsities of the teachers used so far."""
        return self.teachers.sparsities


TRAINER = ProgressiveTrainer


def pipeline(run: Run) -> dict[Path, Record]:
    """Make a smaller checkpoint for each of a run's targets; see `nuteprune.pipeline`.

    Gates start from scores or all alike. `ProgressiveTrainer` chooses and refits on the way.
    """
    run.write()
    dense = run.judge_dense()
    records: dict[Path, Record] = {}
    for target in run.each_target():
        trainer = run.teach(target)
        sliced = run.slice(trainer, target)
        judged = run.judge(sliced, dense)
        records |= run.save(trainer, judged)
    return records
