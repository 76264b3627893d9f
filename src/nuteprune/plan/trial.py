"""A step of a run that has not begun: timed on training text, or counted without data."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from torch import Tensor

from nuteprune.train.own_answers import EVERY, WITHOUT_TEACHER, own_steps, seconds_to_answer
from nuteprune.train.trainer import NutePruneTrainer

BESIDE = 45
"""Time to judge answers and context, in blocks that are taught."""


@dataclass(frozen=True)
class StepTimes:
    """What a run's steps take.

    Args:
        step: seconds of one, without own answers.
        answers: seconds until the student has answered once; 0 where it does not.
    """

    step: float
    answers: float = 0.0

    def of(self, steps: int) -> float:
        """Return the seconds of all steps of a run."""
        own = own_steps(steps) * bool(self.answers)
        read = own * WITHOUT_TEACHER * self.step
        return steps * self.step + read + math.ceil(own / EVERY) * self.answers

    def within(self, seconds: float) -> int:
        """Return how many steps there is time for."""
        steps = max(0, math.floor(seconds / self.step))
        while steps and self.of(steps) > seconds:
            steps -= 1
        return steps


def seconds_per_step(trainer: NutePruneTrainer) -> float:
    """Return the seconds of an optimizer step, the mean over those of the run."""
    steps = trainer.steps()
    return step_times(trainer).of(steps) / steps


def step_times(trainer: NutePruneTrainer, passes: int = 2) -> StepTimes:
    """Time one optimizer step on training text; nothing is learned.

    Args:
        trainer: a run that has not begun.
        passes: how many are timed, after one that warms up. The quickest counts.
    """
    args, dataset = trainer.args, cast(Any, trainer.train_dataset)
    batch = [dataset[i % len(dataset)] for i in range(args.train_batch_size)]
    inputs = trainer._prepare_inputs(trainer.data_collator(batch))
    before, seconds, model = trainer.masks, math.inf, trainer.model
    cut_by_chance(trainer)
    for _ in range(1 + passes):
        started = time.monotonic()
        with trainer.accelerator.autocast():
            trial_step(trainer, inputs)
        model.zero_grad()
        seconds = min(seconds, time.monotonic() - started)
    model.eval()
    seconds *= args.gradient_accumulation_steps
    answering = 0.0
    if trainer.reads_own_answers:
        with trainer.answering() as student:
            answering = seconds_to_answer(student, inputs["input_ids"].shape[1])
    trainer.masks = before
    return StepTimes(seconds, answering)


def cut_by_chance(trainer: NutePruneTrainer) -> None:
    """Give a run that has not begun random masks at its target."""
    masks = trainer.prepared.allocator.chance(trainer.target.sparsity).to(trainer.prepared.device)
    if trainer.args.progressive:
        import_module("nuteprune.progressive.plan").begin(trainer, masks)
    else:
        trainer.masks = masks


def trial_step(trainer: NutePruneTrainer, inputs: dict[str, Any]) -> Tensor:
    """Run a micro-batch as `Trainer` would, and return its loss; leaves its gradients.

    Args:
        trainer: a run that has masks, and has not begun.
        inputs: `input_ids` (B, T) and maybe `attention_mask` (B, T), on the run's device.
    """
    args, model = trainer.args, cast(Any, trainer.anatomy.model)
    # Kernels, activations and dtypes may differ by it.
    trainer.model.train()
    if args.gradient_checkpointing:
        # Its newer name; releases that do not know it yet have the older one alone.
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)(args.gradient_checkpointing_kwargs)
    with trainer.student(inputs):
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    return loss.detach()
