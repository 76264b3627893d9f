"""What `prune`, `demo` and `recover` are asked to do, and the folder that it goes to."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nuteprune.data.blocks import DEMO
from nuteprune.errors import RunFailed, UserError
from nuteprune.files import at_home, read_sums, remove, writing
from nuteprune.jobs.sources import pick_device
from nuteprune.run_folder import CARD, RECORD, RUN, SUMS, TARGET, hidden
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.setup import chosen_settings
from nuteprune.train.state import last_checkpoint


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
        bits: 8 or 4: hold the dense model's projections in so many bits; None: in `dtype`.
        settings: overrides of `NutePruneConfig`.
        dry_run: say what would be done, and write nothing.
        resume: go on from the last checkpoint in `out`.
        overwrite: replace what is in `out`.
        trust_remote_code: run Python code that comes with the model's tokenizer.
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
    bits: int | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    dry_run: bool = False
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False


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
    named_by_user = (("model", job.model), ("data", job.data), ("eval data", job.eval_data))
    for what, named in named_by_user:
        if named in (None, DEMO):
            continue
        place = at_home(named)
        if place.exists() and place.resolve().is_relative_to(out.resolve()):
            raise UserError(f"--out {out} holds the {what} {named}; name another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if job.resume:
        if last_checkpoint(out / RUN) is None:
            raise UserError(
                f"nothing to resume in {out}: no complete checkpoint is in {out / RUN}; start "
                "anew without --resume, with --overwrite if the folder is not empty"
            )
        foreign = sorted({x.name for x in out.iterdir() if not hidden(x)} - written_in(out))
        if foreign and not job.overwrite:
            raise UserError(
                f"--out {out} holds {foreign[0]}, which the run has not written; move it away, or "
                "pass --overwrite too, which removes it"
            )
        return
    if out.exists() and any(out.iterdir()) and not job.overwrite:
        raise UserError(
            f"--out {out} is not empty; name another folder, or pass --overwrite to replace it or "
            "--resume to go on with it"
        )
    if not job.dry_run:
        check_writable(out)


def check_writable(folder: Path) -> None:
    """Refuse a folder that nothing can be written to, before hours are spent; writes nothing.

    Raises:
        UserError: if neither it nor the nearest folder above it that is there takes a file.
    """
    there = next(x for x in (folder.absolute(), *folder.absolute().parents) if x.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {there}: {error.strerror}; name another --out") from error


def target_folder(job: Job, targets: Sequence[float], index: int) -> Path:
    """Return where the checkpoint of a target goes: to folders of their own where several do."""
    return job.out if len(targets) == 1 else job.out / f"{TARGET}{targets[index]:g}"


def written_in(out: Path) -> set[str]:
    """Return the names of what runs write into their folder, as far as it is there.

    The sums name a checkpoint's files, and are the first of them to come and the last to go.
    """
    named = {RUN, SUMS, RECORD, CARD, "additional_chat_templates", *read_sums(out)}
    matching = (
        x.name for pattern in (f"{TARGET}*", ".*partial", ".*removed") for x in out.glob(pattern)
    )
    return {x.name for x in out.iterdir()} & (named | set(matching))


def clear_result(out: Path, overwrite: bool = False) -> None:
    """Remove what an earlier end of a run wrote, and keep the run itself.

    Args:
        out: the output folder.
        overwrite: remove what is not the run's as well.
    """
    visible = {x.name for x in out.iterdir() if not hidden(x)} if overwrite else set()
    _remove(out, (written_in(out) | visible) - {RUN})


def _remove(out: Path, names: Iterable[str]) -> None:
    with writing(out):
        # First what makes a folder a checkpoint, lest one that is gone in part look whole.
        order = {"config.json": 0, SUMS: 2}
        for name in sorted(names, key=lambda name: order.get(name, 1)):
            remove(out / name)


def clear(out: Path) -> None:
    """Remove all that is in a folder; if this is cut short, what is left cannot be resumed."""
    if not out.exists():
        return
    with writing(out):
        doomed = out / f".{RUN}.removed"
        remove(doomed)
        if (out / RUN).exists():
            (out / RUN).replace(doomed)
    _remove(out, [path.name for path in out.iterdir()])


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other runs on this machine out of a folder for a while.

    Raises:
        UserError: if one is at work there.
    """
    user = getattr(os, "getuid", int)()
    place = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"nuteprune-{user}-{place}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another run is at work in --out {out}: name another folder") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Take back the empty folders that a trainer makes for a run that cannot begin."""
    made = [x for x in (folder, *folder.absolute().parents) if not x.exists()]
    try:
        yield
    except UserError:
        for path in (folder / RUN, *made):
            with suppress(OSError):  # not empty, or not there
                path.rmdir()
        raise


def make_config(job: Job, folder: Path) -> NutePruneConfig:
    """Return the settings of a job's run in a folder.

    Raises:
        UserError: if they cannot work.
    """
    with settings_of_user():
        return NutePruneConfig(output_dir=str(folder), **trainer_settings(job))


@contextmanager
def settings_of_user() -> Iterator[None]:
    """Tell in one line what libraries say of settings, which they check in many places.

    Raises:
        UserError: in place of any other error.
    """
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise UserError(f"these settings cannot work ({said}); check the options") from error


def run_config(job: Job, args: NutePruneConfig) -> dict[str, Any]:
    """Return the settings that reproduce a run: the job's, and those that are not defaults."""
    own = {key: value for key, value in vars(job).items() if key in JOB_KEYS and value is not None}
    if args.shape is None:
        own["target_sparsity"] = args.target_sparsity
    return {**own, **chosen_settings(args)}


JOB_KEYS = (
    "model",
    "data",
    "eval_data",
    "text_column",
    "length",
    "eval_blocks",
    "device",
    "dtype",
    "bits",
)
"""Fields of a job that a run is reproduced by, beside its settings."""
