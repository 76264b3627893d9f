"""A step of a run that has not begun: timed on training text, or counted without data."""

from __future__ import annotations

import math
import time
from importlib import import_module
from typing import Any, cast

from torch import Tensor

from nuteprune.train.own_answers import seconds_of_a_step
from nuteprune.train.trainer import NutePruneTrainer


def seconds_per_step(trainer: NutePruneTrainer, passes: int = 2) -> float:
    """Return the seconds of one optimizer step, timed on training text; nothing is learned.

    They include a step's share of the time for the student's own answers.

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
    if trainer.reads_own_answers:
        with trainer.answering() as student:
            seconds += seconds_of_a_step(student, seconds)
    trainer.masks = before
    return seconds


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
