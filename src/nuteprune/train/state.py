"""What a trainer checkpoint holds of the method, beside what `transformers.Trainer` saves.

One safetensors file: LoRA weights and gates, and in its metadata the teachers' sparsities and
whether masks are frozen. Files appear complete or not at all.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from nuteprune.errors import UserError

FILE_NAME = "nuteprune_state.safetensors"
NOTES = ("teachers", "stops")


@dataclass(frozen=True)
class RunState:
    """The method's state at the end of a step.

    Args:
        lora: LoRA weights by layer, projection and side.
        gates: the gates' parameters and buffers.
        masks: the final masks by kind, empty until they are frozen.
        teachers: sparsity of each teacher on disk.
        stops: which teachers are the models of earlier targets.
    """

    lora: dict[str, Tensor]
    gates: dict[str, Tensor]
    masks: dict[str, Tensor]
    teachers: list[float]
    stops: list[int]

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint folder."""
        groups = {"lora": self.lora, "gates": self.gates, "masks": self.masks}
        tensors = {
            f"{group}/{name}": value.detach().cpu().contiguous()
            for group, values in groups.items()
            for name, value in values.items()
        }
        notes = {name: json.dumps(getattr(self, name)) for name in NOTES}
        path = folder / FILE_NAME
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata=notes)
        os.replace(partial, path)

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read the state of a checkpoint folder.

        Raises:
            UserError: if the folder has none.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise UserError(f"cannot resume from {folder}: it has no {FILE_NAME}")
        groups: dict[str, dict[str, Tensor]] = {"lora": {}, "gates": {}, "masks": {}}
        with safe_open(path, framework="pt") as file:
            notes = {k: json.loads(v) for k, v in file.metadata().items() if k in NOTES}
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                group, name = key.split("/", 1)
                groups[group][name] = file.get_tensor(key)
        return cls(groups["lora"], groups["gates"], groups["masks"], **notes)


@torch.no_grad()
def restore(current: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """Copy saved tensors into current ones of the same names and shapes.

    Raises:
        UserError: if they do not match: the checkpoint is of a run with other settings.
    """
    if {k: v.shape for k, v in current.items()} != {k: v.shape for k, v in saved.items()}:
        raise UserError(
            f"cannot resume: the checkpoint's {what} are not those of this model and these "
            "settings; resume with the run's own settings, or start anew with --overwrite"
        )
    for name, value in saved.items():
        current[name].copy_(value)


def last_checkpoint(run: Path) -> Path | None:
    """Return the newest trainer checkpoint of a run, None if there is none to resume from."""
    found = get_last_checkpoint(str(run)) if run.is_dir() else None
    return Path(found) if found else None
