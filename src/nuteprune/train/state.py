"""What a trainer checkpoint holds of the method, beside what `transformers.Trainer` saves.

One safetensors file: the tensors of `GROUPS`, and in its metadata the lists of `NOTES`. It appears
complete or not at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open

from nuteprune.errors import UserError
from nuteprune.files import atomic, read_sums
from nuteprune.run_folder import CHECKPOINT, STATE

if TYPE_CHECKING:
    from torch import Tensor

MODEL_FILES = ("config.json", "model.safetensors", "pytorch_model.bin", "adapter_config.json")
"""What tells a folder with a model from a checkpoint of ours, which has none of these."""
GROUPS = ("lora", "gates", "masks", "first_scores")
NOTES = ("frozen", "teachers", "reached", "sums", "bad_steps")


@dataclass(frozen=True)
class RunState:
    """The method's state at the end of a step.

    Args:
        lora: LoRA weights by layer, projection and side.
        gates: the gates' parameters and buffers.
        masks: the masks of the moment by kind, without noise.
        frozen: whether they are final.
        teachers: sparsity of each teacher on disk.
        reached: which teachers are the models of earlier targets.
        first_scores: the units' scores before training, by kind.
        sums: SHA-256 of each teacher's file.
        bad_steps: steps that were not finite: in all, and in a row up to now.
    """

    lora: dict[str, Tensor]
    gates: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    frozen: bool = False
    teachers: list[float] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    first_scores: dict[str, Tensor] = field(default_factory=dict)
    sums: list[str] = field(default_factory=list)
    bad_steps: list[int] = field(default_factory=lambda: [0, 0])

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint folder."""
        groups = {name: getattr(self, name) for name in GROUPS}
        tensors = {
            f"{group}/{name}": value.detach().cpu().contiguous()
            for group, values in groups.items()
            for name, value in values.items()
        }
        from safetensors.torch import (
            save_file,  # loads torch: whoever looks for checkpoints need not
        )

        # One entry: safetensors writes several in an order that changes from run to run.
        notes = {"notes": json.dumps({name: getattr(self, name) for name in NOTES})}
        with atomic(folder / STATE) as partial:
            save_file(tensors, partial, metadata=notes)

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read the state of a checkpoint folder.

        Raises:
            UserError: if the folder has none, or one that is damaged.
        """
        path = folder / STATE
        if not path.is_file():
            raise UserError(f"cannot resume from {folder}: it has no {STATE}")
        groups: dict[str, dict[str, Tensor]] = {name: {} for name in GROUPS}
        try:
            with safe_open(path, framework="pt") as file:
                notes = json.loads(file.metadata()["notes"])
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    group, name = key.split("/", 1)
                    groups[group][name] = file.get_tensor(key)
            return cls(**cast(dict[str, Any], groups | notes))
        except (AttributeError, KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged: {error}") from error


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
    """Return the newest trainer checkpoint of a run, None if there is none to resume from.

    One that is there in part, since it was being removed or copied when something stopped that,
    does not count.
    """
    return next(filter(_is_whole, reversed(checkpoints(run))), None)


def own_checkpoints(run: Path) -> list[Path]:
    """Return those of `checkpoints` that are nuteprune's: others may be a model of the user's."""
    return [folder for folder in checkpoints(run) if (folder / STATE).is_file()]


def check_places(run: Path, steps: int) -> None:
    """Refuse folders that a run's checkpoints would replace: a model of the user's, say.

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
    """Return a run's trainer checkpoints, those there in part too, the newest last."""
    found = run.glob(f"{CHECKPOINT}*") if run.is_dir() else ()
    numbered = [(int(number), x) for x in found if (number := x.name.rpartition("-")[2]).isdigit()]
    return [folder for _, folder in sorted(numbered)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        names = read_sums(checkpoint)
    except UserError:
        return False
    return bool(names) and all((checkpoint / name).is_file() for name in names)
