"""Models that `eval` judges: dense, pruned, or in the middle of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.export.record import read_record
from nuteprune.files import at_home
from nuteprune.jobs.job import JOB_KEYS
from nuteprune.jobs.sources import load_model
from nuteprune.run_folder import RECORD
from nuteprune.train.midway import is_midway, load_midway


@dataclass(frozen=True)
class Judged:
    """A model to judge.

    Args:
        name: as the user named it.
        source: the model whose files and tokenizer are read.
        checkpoint: the trainer checkpoint to apply to it; None: none.
        settings: settings of that checkpoint's run.
    """

    name: str
    source: str
    checkpoint: Path | None
    settings: Mapping[str, Any]

    def load(self, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, float | None]:
        """Return the model on a device, and the sparsity of its masks if it is midway."""
        model = load_model(self.source, dtype).to(device)  # type: ignore[arg-type]
        if self.checkpoint is None:
            return model, None
        return load_midway(model, self.checkpoint, self.settings)


def judged(name: str, base: str | None, dense: str | None, settings: Mapping[str, Any]) -> Judged:
    """Return what a user names: a model, or a trainer checkpoint of a run.

    Args:
        name: hub id, checkpoint folder, `demo`, or `OUT/run/checkpoint-N`.
        base: the model that the run prunes; None: the one in OUT's record, else `dense`.
        dense: the dense model that the user compares with.
        settings: the run's settings as far as they are given; the record in OUT has them too.

    Raises:
        UserError: if it cannot be told what model a run prunes.
    """
    folder = at_home(name)
    if not is_midway(folder):
        return Judged(name, name, None, {})
    out = folder.resolve().parent.parent
    recorded: dict[str, Any] = {}
    if (out / RECORD).is_file():
        recorded = read_record(out).get("config", {})
    source = base or recorded.get("model") or dense
    if source is None:
        raise UserError(
            f"{name} is a checkpoint in the middle of a run, and holds only what the run has "
            "learned; pass the model that it prunes as --base"
        )
    own = {k: v for k, v in recorded.items() if k not in JOB_KEYS}
    return Judged(name, str(source), folder, {**own, **settings})
