"""Shows a training run: a progress bar with the loss and other current figures."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerState

from nuteprune.console import Bars
from nuteprune.train.trainer import NutePruneTrainer


class StepProgress(TrainerCallback):
    """Feeds a progress bar from the trainer's logs.

    Args:
        trainer: whose run it is.
        bars: where it is shown.
    """

    def __init__(self, trainer: NutePruneTrainer, bars: Bars) -> None:
        self.trainer, self.bars = trainer, bars

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Show the newest figures."""
        if logs and "loss" in logs:
            self.bars.update("teach", state.global_step, state.max_steps, self.trainer.note(logs))


class RecoveryProgress(TrainerCallback):
    """Feeds a progress bar, and notes how long each step takes.

    Args:
        bars: where it is shown.
    """

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._started)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Show the newest loss."""
        if logs and "loss" in logs:
            note = f"loss {logs['loss']:.3f}"
            self.bars.update("recovering", state.global_step, state.max_steps, note)
