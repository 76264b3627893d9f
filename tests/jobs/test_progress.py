"""What is told of a training run beside its bar."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from nuteprune.console import Bars
from nuteprune.jobs.progress import StepProgress


@pytest.mark.parametrize(("step", "told"), [(4, False), (8, True)], ids=["stopped", "ended"])
def test_masks_of_a_run_that_was_stopped_are_not_frozen(step: int, told: bool) -> None:
    file = StringIO()
    trainer: Any = SimpleNamespace(gates=SimpleNamespace(frozen=False))
    progress = StepProgress(trainer, Bars(Console(file=file, force_terminal=False)))
    state: Any = SimpleNamespace(global_step=step, max_steps=8)
    logs = {"loss": 1.0, "sparsity": 0.01, "target": 0.3, "teacher": -1}
    progress.on_log(None, state, None, logs)
    progress.on_train_end(None, state)
    assert ("learned masks were frozen" in file.getvalue()) == told
