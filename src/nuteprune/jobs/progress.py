"""Shows a training run: a bar with its loss, and what else is worth knowing of the moment."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerState

from nuteprune.console import Bars
from nuteprune.train.trainer import NutePruneTrainer

FAR = 0.05
"""Sparsity that masks may lack when they are frozen. More goes at once then, with no step to learn
which units that should be."""


class StepProgress(TrainerCallback):
    """Feeds a progress bar from the trainer's logs, and tells of masks frozen far from the target.

    Args:
        trainer: whose run it is.
        bars: where it is shown.
    """

    def __init__(self, trainer: NutePruneTrainer, bars: Bars) -> None:
        self.trainer = trainer
        self.bars = bars
        self._last = {"sparsity": 0.0, "target": 0.0}

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Show the newest figures."""
        if not logs or "loss" not in logs:
            return
        note = (
            f"loss {logs['loss']:.3f}  sparsity {logs['sparsity']:.1%}  "
            f"teacher {self._teacher(int(logs['teacher']))}"
        )
        self.bars.update("pruning", state.global_step, state.max_steps, note)
        if self.trainer.gates.frozen:
            self._tell_if_far()
        self._last = {name: logs[name] for name in self._last}

    def on_train_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """Speak of masks that are frozen after the last step."""
        if state.global_step >= state.max_steps:  # else the run was stopped
            self._tell_if_far()

    def _tell_if_far(self) -> None:
        expected, target = self._last["sparsity"], self._last["target"]
        if expected < target - FAR:
            self.bars.line(
                f"learned masks were frozen where they expected to cut {expected:.1%}, not "
                f"{target:.1%}: quality suffers; more --steps let them get there"
            )

    def _teacher(self, index: int) -> str:
        return "dense" if index < 0 else f"{self.trainer.teachers.sparsities[index]:.1%}"


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
