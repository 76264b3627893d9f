"""A Trainer whose checkpoints are complete or absent, and whose metrics never run ahead of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints


class AtomicTrainer(Trainer):
    """`transformers.Trainer` for runs that may be killed at any moment.

    Trainer writes into `checkpoint-N` directly, and would resume from a half-written one; here a
    checkpoint is written beside its place and moved there when it is complete. Each step's line is
    in `metrics.jsonl`, cut back to the checkpoint on resume.
    """

    _checkpoint_dir: Path | None = None

    @property
    def metrics_file(self) -> Path:
        """Where each step's line goes."""
        return Path(cast(str, self.args.output_dir)) / "metrics.jsonl"

    def write_metrics(self, logs: Mapping[str, Any]) -> None:
        """Add a line for the step that has ended; the main process alone does."""
        if not self.args.should_save:
            return
        line = {"step": self.state.global_step, **logs}
        self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, and move it there when it is complete."""
        run = Path(cast(str, self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        partial = run / ".partial"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # each process adds its own random state
        self._checkpoint_dir = partial
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoint_dir = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(partial / name, run / name)
            shutil.rmtree(partial, ignore_errors=True)
            rotate_checkpoints(output_dir=str(run), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_dir or super()._get_output_dir(trial))

    def cut_metrics(self, step: int) -> None:
        """Forget what was logged after a step, since a resumed run logs it again."""
        if self.metrics_file.exists():
            lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
            partial = self.metrics_file.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, self.metrics_file)
