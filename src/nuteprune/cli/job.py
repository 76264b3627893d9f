"""What `prune` and `demo` are asked to do, and the folder that it goes to."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuteprune.cli.sources import pick_device
from nuteprune.errors import UserError
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.state import last_checkpoint

RUN = "run"
"""Folder inside the output folder for checkpoints, teachers and metrics."""


@dataclass
class Job:
    """What `prune` is asked to do.

    Args:
        model: hub id, checkpoint folder, or `demo`.
        data: training text; see `train.data`.
        out: folder for the result.
        eval_data: text to judge by; None: the held-out part of `data`.
        text_column: column of the text in structured files.
        length: tokens per block.
        eval_blocks: held-out blocks per source.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16`, ...: what the run computes in.
        settings: overrides of `NutePruneConfig`.
        dry_run: say what would be done, and write nothing.
        resume: go on from the last checkpoint in `out`.
        overwrite: replace what is in `out`.
    """

    model: str
    data: str
    out: Path
    eval_data: str | None = None
    text_column: str | None = None
    length: int = 256
    eval_blocks: int = 24
    device: str = "auto"
    dtype: str = "auto"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    dry_run: bool = False
    resume: bool = False
    overwrite: bool = False


def trainer_settings(job: Job) -> dict[str, Any]:
    """Return the settings for `NutePruneConfig`: the job's device on top of its overrides."""
    device = pick_device(job.device)
    return {
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 2,
        **job.settings,
        "use_cpu": device == "cpu",
    }


def check_out(job: Job) -> None:
    """Refuse an output folder with something in it, unless told what to do with it.

    Raises:
        UserError: if the folder is in the way, or there is nothing to resume in it.
    """
    out = job.out
    for what, named in (("model", job.model), ("data", job.data)):
        place = Path(named).expanduser()
        if place.exists() and place.resolve().is_relative_to(out.resolve()):
            raise UserError(f"--out {out} holds the {what} {named}; name another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if job.resume:
        if last_checkpoint(out / RUN) is None:
            raise UserError(f"nothing to resume in {out}: there is no checkpoint in {out / RUN}")
        return
    if out.exists() and any(out.iterdir()) and not job.overwrite:
        raise UserError(
            f"--out {out} is not empty; name another folder, or pass --overwrite to replace it or "
            "--resume to go on with it"
        )


def resume_from(job: Job) -> str | None:
    """Return the trainer checkpoint to go on from, None to start at the beginning."""
    checkpoint = last_checkpoint(job.out / RUN) if job.resume else None
    return str(checkpoint) if checkpoint else None


def target_folder(job: Job, targets: Sequence[float], index: int) -> Path:
    """Return where the checkpoint of a target goes: to folders of their own where several do."""
    return job.out if len(targets) == 1 else job.out / f"sparsity-{targets[index]:g}"


def clear_result(out: Path) -> None:
    """Remove what an earlier end of a run wrote, and keep the run itself."""
    for path in out.iterdir():
        if path.is_dir() and path.name != RUN:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def run_config(job: Job, args: NutePruneConfig) -> dict[str, Any]:
    """Return the settings that reproduce a run: the job's, and those that are not defaults."""
    defaults = NutePruneConfig()
    changed = {
        f.name: getattr(args, f.name)
        for f in dataclasses.fields(args)
        if f.init
        and f.name in NUTEPRUNE_KEYS
        and getattr(args, f.name) != getattr(defaults, f.name)
    }
    own = {key: value for key, value in vars(job).items() if key in JOB_KEYS and value is not None}
    if args.shape is None:
        own["target_sparsity"] = args.target_sparsity
    return {**own, **changed}


JOB_KEYS = (
    "model",
    "data",
    "eval_data",
    "text_column",
    "length",
    "eval_blocks",
    "device",
    "dtype",
)
"""Fields of a job that a run is reproduced by, beside its settings."""


NUTEPRUNE_KEYS = frozenset(f.name for f in dataclasses.fields(NutePruneConfig)) - {
    "output_dir",
    "disable_tqdm",
    "use_cpu",
    "logging_dir",
    "report_to",
}
