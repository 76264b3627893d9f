"""What a trainer checkpoint holds of the method, beside what `transformers.Trainer` saves.

One safetensors file: tensors in groups, and notes in its metadata. It appears complete or not at
all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuteprune.errors import UserError
from nuteprune.files import damage, read_sums, write_text
from nuteprune.run_folder import CHECKPOINT, STATE

if TYPE_CHECKING:
    from torch import Tensor

MODEL_FILES = ("config.json", "model.safetensors", "pytorch_model.bin", "adapter_config.json")
"""Files that only a folder with a model has: a trainer checkpoint of ours has none of them."""


@dataclass(frozen=True)
class RunState:
    """The method's state at the end of a step.

    Args:
        tensors: group -> name -> value; `lora` has LoRA's sides by layer, projection and side.
        notes: the rest of the state, for JSON.
    """

    tensors: dict[str, dict[str, Tensor]]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def lora(self) -> dict[str, Tensor]:
        """LoRA's sides, and the other tensors of `LoraBank.state`."""
        return self.tensors.get("lora", {})

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint folder."""
        from nuteprune.products import write_tensors  # torch: a look for checkpoints needs none

        groups = self.tensors.items()
        named = {f"{group}/{name}": x for group, values in groups for name, x in values.items()}
        write_tensors(folder / STATE, named, self.notes)

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read the state of a checkpoint folder.

        Raises:
            UserError: if the folder has none, or one that is damaged.
        """
        from nuteprune.products import read_tensors  # see `save`

        path = folder / STATE
        if not path.is_file():
            raise UserError(f"cannot resume from {folder}: it has no {STATE}")
        groups: dict[str, dict[str, Tensor]] = {}
        try:
            tensors, notes = read_tensors(path)
            for key, value in tensors.items():
                group, name = key.split("/", 1)
                groups.setdefault(group, {})[name] = value
            return cls(groups, notes)
        except (UserError, ValueError) as error:
            raise UserError(f"{path} is damaged: {error.__cause__ or error}") from error


def last_checkpoint(run: Path) -> Path | None:
    """Return the newest trainer checkpoint of a run, None if there is none to resume from.

    An incomplete one, left by an interrupted removal or copy, does not count.
    """
    return next(filter(_is_whole, reversed(checkpoints(run))), None)


def own_checkpoints(run: Path) -> list[Path]:
    """Return the `checkpoints` that nuteprune wrote: others may be a user's model."""
    return [folder for folder in checkpoints(run) if (folder / STATE).is_file()]


def check_places(run: Path, steps: int) -> None:
    """Refuse to replace folders, such as a user's model, by a run's checkpoints.

    Args:
        run: the run's folder.
        steps: how many it has.

    Raises:
        UserError: naming the folder.
    """
    for folder in checkpoints(run):  # of our own, what a kill left of one may be there
        model = any((folder / name).is_file() for name in MODEL_FILES)
        if model and int(folder.name.rpartition("-")[2]) <= steps:
            raise UserError(
                f"{folder} is no checkpoint of nuteprune's, and one of this run may come to be "
                "there; name another output_dir"
            )


def checkpoints(run: Path) -> list[Path]:
    """Return a run's trainer checkpoints, incomplete ones too, the newest last."""
    found = run.glob(f"{CHECKPOINT}*") if run.is_dir() else ()
    numbered = [(int(number), x) for x in found if (number := x.name.rpartition("-")[2]).isdigit()]
    return [folder for _, folder in sorted(numbered)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        names = read_sums(checkpoint)
    except UserError:
        return False
    return bool(names) and all((checkpoint / name).is_file() for name in names)


def check_checkpoint(folder: Path) -> None:
    """Refuse a trainer checkpoint that has changed since it was written.

    Raises:
        UserError: naming what is wrong.
    """
    if not folder.is_dir():
        raise UserError(f"nothing to resume: there is no folder {folder}")
    if found := damage(folder):
        raise UserError(
            f"cannot resume: {found}; remove {folder} to go on from the checkpoint before it, or "
            "start anew with --overwrite"
        )


def cut_metrics(metrics: Path, step: int) -> None:
    """Remove the log after a step, since a resumed run logs those steps again.

    Raises:
        UserError: if the file is damaged before that step.
    """
    kept = []
    # Nothing but what is between complete lines is looked at: the last may be cut off.
    for number, line in enumerate(metrics.read_bytes().split(b"\n")[:-1], 1):
        try:
            logged = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{metrics} is damaged: remove its line {number} to go on") from error
        if logged > step:
            break
        kept.append(line.decode() + "\n")
    write_text(metrics, "".join(kept))
