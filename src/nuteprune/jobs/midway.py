"""Models that `eval` judges: dense, pruned, or in the middle of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.files import at_home
from nuteprune.jobs.sources import load_model
from nuteprune.train.midway import is_midway, load_midway
from nuteprune.train.run_settings import read_settings


@dataclass(frozen=True)
class Judged:
    """A model to judge.

    Args:
        name: as the user named it.
        source: the model whose files and tokenizer are read.
        checkpoint: the trainer checkpoint to apply to it; None: none.
    """

    name: str
    source: str
    checkpoint: Path | None = None

    def load(self, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, float | None]:
        """Return the model on a device, and the sparsity of its masks if it is midway."""
        model = load_model(self.source, dtype).to(device)  # type: ignore[arg-type]
        return (model, None) if self.checkpoint is None else load_midway(model, self.checkpoint)


def judged(name: str, base: str | None) -> Judged:
    """Return what a user names: a model, or a trainer checkpoint of a run.

    Args:
        name: hub id, checkpoint folder, `demo`, or `OUT/run/checkpoint-N`.
        base: where the model that the run prunes is now; None: where the run found it.

    Raises:
        UserError: if it cannot be told what model a run prunes.
    """
    folder = at_home(name)
    if not is_midway(folder):
        return Judged(name, name)
    source = base or read_settings(folder.resolve().parent).get("model")
    if not source:
        raise UserError(
            f"{name} is a checkpoint in the middle of a run, and holds only what the run has "
            "learned; pass the model that it prunes as --base"
        )
    return Judged(name, str(source), folder)
