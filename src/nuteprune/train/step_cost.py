"""What a step costs, measured before a run starts."""

from __future__ import annotations

import time
from typing import Any, cast

from torch import Tensor

from nuteprune.train.simulate import recompute
from nuteprune.train.trainer import NutePruneTrainer


def seconds_per_step(trainer: NutePruneTrainer) -> float:
    """Return the seconds of one optimizer step, timed on training text; nothing is learned."""
    args, dataset = trainer.args, cast(Any, trainer.train_dataset)
    batch = [dataset[i % len(dataset)] for i in range(args.train_batch_size)]
    inputs = trainer._prepare_inputs(trainer.data_collator(batch))
    if trainer.schedule.stage(0).freeze_step == 0:
        trainer.gates.restore_masks(trainer.allocator.chance(trainer.targets[-1]))
    seconds, model = 0.0, trainer.model
    # What `Trainer` does when it trains: kernels, activations and dtypes may differ by it.
    model.train()
    if args.gradient_checkpointing:
        recompute(trainer.anatomy.model, args.gradient_checkpointing_kwargs)
    for _ in range(2):  # the first one warms up
        started = time.monotonic()
        with trainer.accelerator.autocast():
            trial_step(trainer, inputs)
        model.zero_grad()
        seconds = time.monotonic() - started
    model.eval()
    trainer.gates.thaw()
    return seconds * args.gradient_accumulation_steps


def trial_step(trainer: NutePruneTrainer, inputs: dict[str, Any], teacher: int = -1) -> Tensor:
    """Run a micro-batch at the last target; leaves its gradients.

    Args:
        trainer: a run that has not begun.
        inputs: `input_ids` (B, T) and maybe `attention_mask` (B, T), on the run's device.
        teacher: index of who teaches, -1 for the dense model.

    Returns:
        The loss.
    """
    trainer.gates.begin_step(trainer.targets[-1], trainer.args.seed)
    trainer.pruning.teacher_index = teacher
    with trainer.student(inputs):
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    return loss.detach()
