"""The sparsity schedule, and its numerous teachers: snapshots of masks and LoRA, kept on disk.

While sparsity grows, the student learns from a teacher that is a few snapshots less pruned. Once
the target is reached, it walks back through the teachers to the dense model, in equal shares of the
steps that `Schedule.rested` gives. Source: the paper's progressive distillation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nuteprune.distill.coforward import DENSE, Role
from nuteprune.errors import RunFailed, UserError
from nuteprune.files import file_sum, writing
from nuteprune.gates.masks import Layout, Masks
from nuteprune.products import read_tensors, write_tensors

LORA = "lora"
"""The tensor of a snapshot that holds all LoRA weights; the others are masks, by kind."""


@dataclass(frozen=True)
class Schedule:
    """Sparsity over the steps of a run, and who teaches when: a ramp to the target, then rest.

    As published, a snapshot is taken at every point of sparsity, and the teacher is 10 behind. Both
    are scaled down where a run is small, so that it has teachers too.

    Args:
        target: sparsity to reach.
        steps: optimizer steps of the whole run.
        ramp_share: share of the steps by which the target is reached.
        freeze_share: share of the steps by which masks are fixed, if later than the ramp; where
            both shares are 0 they are fixed before the first step.
        snapshots_teach: whether snapshots do, if the ramp leaves any; else the dense model.
    """

    target: float
    steps: int
    ramp_share: float = 0.5
    freeze_share: float = 0.0
    snapshots_teach: bool = True

    @property
    def ramp_steps(self) -> int:
        """The number of steps until the schedule asks for the target."""
        return max(1, min(self.steps, round(self.steps * self.ramp_share)))

    @property
    def freeze_step(self) -> int:
        """Step before which masks are fixed, counted from 0."""
        ramp = self.ramp_steps if self.ramp_share else 0
        return max(ramp, round(self.steps * self.freeze_share))

    @property
    def has_snapshots(self) -> bool:
        """Whether snapshots teach: the target is reached over several steps."""
        return self.snapshots_teach and self.ramp_steps > 1

    @property
    def spacing(self) -> float:
        """The sparsity between snapshots: 1 %, or less for a small target."""
        return min(0.01, self.target / 10)

    @property
    def snapshots(self) -> float:
        """About how many snapshots the ramp leaves, at most one a step."""
        return min(self.target / self.spacing, self.ramp_steps) if self.has_snapshots else 0

    @property
    def lag(self) -> int:
        """While sparsity grows, the teacher is this many snapshots behind the newest."""
        return min(10, max(1, round(self.snapshots / 2)))

    def sparsity(self, step: int) -> float:
        """Return the scheduled sparsity at a step, counted from 0."""
        return self.target * min(1.0, (step + 1) / self.ramp_steps)

    def rests(self, step: int) -> bool:
        """Return whether the ramp is over at a step."""
        return step + 1 >= self.ramp_steps

    def rested(self, step: int) -> float:
        """Return the share of the way back through the teachers that will be over after a step.

        The way back takes all of the rest, as published, or as long as the ramp where that is less:
        a teacher serves as many steps as the ramp took to pass it. After that it is 1 or more.
        """
        left = max(1, min(self.steps - self.ramp_steps, self.ramp_steps))
        return (step - self.ramp_steps + 1) / left

    def due(self, sparsity: float, newest: float) -> bool:
        """Return whether a snapshot is to be taken at a sparsity."""
        return self.has_snapshots and sparsity >= newest + self.spacing - 1e-9

    def teacher(self, step: int, count: int) -> int:
        """Return the index of a step's teacher among `count`, -1 for the dense model."""
        if not self.has_snapshots:
            return -1
        if self.rests(step):
            return self.returning(count, self.rested(step))
        return self.growing(count)

    def growing(self, count: int) -> int:
        """Return the index of the teacher while sparsity grows, -1 for the dense model."""
        return max(-1, count - 1 - self.lag)

    def returning(self, count: int, progress: float) -> int:
        """Return the index of the teacher after the target is reached, -1 for the dense model.

        Where fewer snapshots were taken than planned (steps of sparsity can be coarse), only the
        newest half of them counts as too close to the student.

        Args:
            count: teachers there are.
            progress: share of the way back that is over; 1 and more: the dense model's turn.
        """
        useful = count - min(self.lag, max(1, count // 2)) if count else 0
        return max(-1, useful - 1 - int(progress * (useful + 1)))


class Teachers:
    """A queue of snapshots in a folder, at most one of them in memory.

    Args:
        folder: where snapshots are; made when the first is taken.
        layout: the units of the model's masks.
        keep: whether the last one stays in memory when nobody holds it, for devices far from the
            disk. On CPUs, reading a file again takes a moment.
    """

    def __init__(self, folder: Path, layout: Layout, keep: bool = False) -> None:
        self.folder = folder
        self.layout = layout
        self.keep = keep
        self.sparsities: list[float] = []
        self.sums: list[str] = []
        self._loaded: tuple[tuple[int, str, torch.dtype], Role] | None = None

    def __len__(self) -> int:
        return len(self.sparsities)

    @property
    def newest(self) -> float:
        """Sparsity of the newest teacher, 0 (the dense model's) if there is none."""
        return self.sparsities[-1] if self.sparsities else 0.0

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:04d}.safetensors"

    def record(self, sparsity: float, masks: Masks, lora: Mapping[str, Tensor]) -> None:
        """Write a snapshot, its LoRA weights in bfloat16: complete on disk, or not at all.

        Raises:
            RunFailed: if it cannot be written.
        """
        shapes = {key: list(value.shape) for key, value in lora.items()}
        notes = {"sparsity": sparsity, "shapes": shapes}
        path = self._path(len(self))
        # One by one: a device may have no room for a second copy of all.
        packed = torch.cat([x.detach().flatten().to("cpu", torch.bfloat16) for x in lora.values()])
        with writing(f"the teacher {path}", "make room, then go on with --resume"):
            write_tensors(path, {**masks.values, LORA: packed}, notes)
            self.sums.append(file_sum(path))
        self.sparsities.append(sparsity)

    def restore(self, sparsities: Sequence[float], sums: Sequence[str]) -> None:
        """Go back to the teachers that a checkpoint knew; later snapshots are forgotten.

        Args:
            sparsities: of each teacher.
            sums: SHA-256 of each teacher's file.

        Raises:
            UserError: if one is gone, or is not what was written.
        """
        for index, expected in enumerate(sums):
            path = self._path(index)
            if not path.is_file():
                raise UserError(f"cannot resume: the teacher {path} is gone")
            if file_sum(path) != expected:
                raise UserError(f"cannot resume: the teacher {path} is damaged: another SHA-256")
        self.sparsities, self.sums = list(sparsities), list(sums)
        self._loaded = None

    def role(self, index: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Role:
        """Return a teacher, -1 being the dense model.

        Args:
            index: the snapshot's index.
            device: where it is to teach.
            dtype: that of its LoRA weights; the base weights' dtype spares casts.
        """
        if index < 0:
            return DENSE
        if not self.keep:
            return self._read(index, device, dtype)
        wanted = index, device, dtype
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # gone before another one comes
            self._loaded = wanted, self._read(index, device, dtype)
        return self._loaded[1]

    def _read(self, index: int, device: str, dtype: torch.dtype) -> Role:
        path = self._path(index)
        try:
            tensors, notes = read_tensors(path)
        except UserError as error:
            why = error.__cause__
            raise RunFailed(f"the teacher {path} cannot be read any more: {why}") from error
        packed, shapes = tensors.pop(LORA).to(device, dtype), notes["shapes"]
        # Copies: what is read is the file itself, which is in memory as long as a part.
        masks = {k: v.to(device, torch.float32, copy=True) for k, v in tensors.items()}
        parts = packed.split([math.prod(shape) for shape in shapes.values()])
        lora = {key: part.view(shapes[key]) for key, part in zip(shapes, parts, strict=True)}
        return Role(Masks(self.layout, masks), lora)
