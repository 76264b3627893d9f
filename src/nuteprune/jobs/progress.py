"""Shows a training run: a progress bar with the loss and other current figures."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerState

from nuteprune.console import Bars
from nuteprune.train.checkpoints import AtomicTrainer


class StepProgress(TrainerCallback):
    """Feeds a progress bar from the trainer's logs, and notes how long each step takes.

    Args:
        trainer: whose run it is.
        bars: where it is shown.
        what: the bar's name.
    """

    def __init__(self, trainer: AtomicTrainer, bars: Bars, what: str) -> None:
        self.trainer, self.bars, self.what = trainer, bars, what
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
        """Show the newest figures."""
        if logs and "loss" in logs:
            note = self.trainer.note(logs)
            self.bars.update(self.what, state.global_step, state.max_steps, note)
