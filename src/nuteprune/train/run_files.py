"""What a trainer leaves in its run's folder: checkpoints that are whole, a line per logged step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

METRICS = "metrics.jsonl"


class RunFiles(Trainer):
    """A trainer whose files survive being killed at any time."""

    _checkpoint_dir: Path | None = None

    @property
    def run_folder(self) -> Path:
        """Where the run's files are."""
        return Path(cast(str, self.args.output_dir))

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Add a line to the run's metrics."""
        if self.args.should_save:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            with (self.run_folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Forget the metrics of steps after a checkpoint's, and a line that is not whole."""
        path = self.run_folder / METRICS
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, path)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, and move it there when it is complete."""
        name = f"checkpoint-{self.state.global_step}"
        partial = self.run_folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        self._checkpoint_dir = partial
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoint_dir = None
        if self.args.should_save:
            shutil.rmtree(self.run_folder / name, ignore_errors=True)
            os.replace(partial / name, self.run_folder / name)
            shutil.rmtree(partial, ignore_errors=True)
            limit = self.args.save_total_limit
            rotate_checkpoints(output_dir=str(self.run_folder), save_total_limit=limit)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_dir or super()._get_output_dir(trial))
