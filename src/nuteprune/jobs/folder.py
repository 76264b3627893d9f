"""The folder that a job writes to: what may be in it, and who may write there."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from nuteprune.data.specs import DEMO
from nuteprune.errors import UserError
from nuteprune.files import at_home, read_sums, remove, writing
from nuteprune.jobs.job import Job
from nuteprune.processes import is_main
from nuteprune.run_folder import (
    CARD,
    RECORD,
    RUN,
    SELF,
    SELF_WRITTEN,
    SETTINGS,
    SUMS,
    TARGETS,
    hidden,
)
from nuteprune.train.asked import Asked
from nuteprune.train.state import last_checkpoint

_TARGET = re.compile(rf"({'|'.join(TARGETS)})\d[\w.+-]*")
"""Names of the folders of several targets, as `train.asked` spells them."""
DEMOS = Path("nuteprune-demo")
"""Where a demo writes that is told nothing else."""
_READ = ("data", "eval data")
"""What is read with all files of its folder."""


def check_out(job: Job, resumes: bool = True) -> None:
    """Refuse an output folder with something in it, unless told what to do with it.

    Args:
        job: the job.
        resumes: whether a job of its kind can be resumed.

    Raises:
        UserError: if the folder is in the way, or there is nothing to resume in it.
    """
    out = job.out
    texts = [("data", spec) for spec in job.specs]
    files = [("settings", str(file)) for file in job.files]
    for what, named in (("model", job.model), *texts, ("eval data", job.eval_data), *files):
        if not named or named in (DEMO, SELF):
            continue
        place = at_home(named)
        if place.exists() and place.resolve().is_relative_to(out.resolve()):
            raise UserError(f"--out {out} holds the {what} {named}; name another folder")
        if what in _READ and place.is_dir() and out.resolve().is_relative_to(place.resolve()):
            raise UserError(
                f"--out {out} is inside the {what} {named}, and what the run writes would be read "
                "as text; name a folder outside"
            )
    if job.overwrite and any(x.is_relative_to(out.resolve()) for x in _around_the_user()):
        raise UserError(
            f"--out {out} holds the home folder or the one that you are in, and --overwrite would "
            "remove all of it; name another folder"
        )
    _check_folder(out)
    if job.resume:
        if not begun(out):
            raise UserError(
                f"nothing to resume in {out}: {out / RUN} has neither a complete checkpoint nor "
                f"{SETTINGS} or {SELF_WRITTEN} of a run that began; start anew without "
                "--resume, with --overwrite if the folder is not empty"
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
            f"--out {out} is not empty; name another folder, or pass --overwrite to replace it"
            + (" or --resume to go on with it" if resumes and begun(out) else "")
        )


def check_free(job: Job, resumes: bool = True) -> None:
    """Refuse a folder that the job cannot write to, before libraries are loaded to do the job.

    The job asks again, when it holds the folder. Arguments and errors as of `check_out`.
    """
    if is_main():
        with alone(job.out) if job.out.is_dir() else nullcontext():
            check_out(job, resumes)


def begun(out: Path) -> bool:
    """Return whether a run has begun in a folder, for `--resume` to go on with or begin anew."""
    run = out / RUN
    kept = (run / SELF_WRITTEN, run / SETTINGS)
    return last_checkpoint(run) is not None or any(x.is_file() for x in kept)


def free_folder(wanted: Path) -> Path:
    """Return the folder, or the first of its numbered siblings that is not taken."""
    folder, number = wanted, 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def begun_folder(wanted: Path) -> Path:
    """Return the newest of the folder and its numbered siblings that a run was begun in."""
    found = [x for x in wanted.parent.glob(f"{wanted.name}*") if begun(x)]
    return max(found, key=lambda x: (x / RUN).stat().st_mtime, default=wanted)


def _check_folder(out: Path) -> None:
    if out.is_symlink() and not out.exists():
        raise UserError(f"--out {out} is a link to {out.readlink()}, which is not there")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")


def _around_the_user() -> Iterator[Path]:
    yield at_home("~").resolve()
    with suppress(OSError):  # a folder that is gone
        yield Path.cwd().parent


def goes_on(job: Job) -> bool:
    """Return whether a job goes on from a checkpoint of its run.

    A run that is resumed before its first one begins anew, with the text that its model wrote.
    """
    return job.resume and last_checkpoint(job.out / RUN) is not None


def is_stated(job: Job) -> bool:
    """Return whether a job resumes a run that has to be the same, as its settings in `run` say."""
    return goes_on(job) or (job.resume and (job.out / RUN / SETTINGS).is_file())


def _check_writable(folder: Path) -> None:
    """Refuse a folder where neither it nor the nearest one above that is there takes a file."""
    there = next(x for x in (folder.absolute(), *folder.absolute().parents) if x.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {there}: {error.strerror}; name another --out") from error


def target_folder(job: Job, targets: Sequence[Asked], index: int) -> Path:
    """Return where the checkpoint of a target goes: to folders of their own where several do."""
    return job.out if len(targets) == 1 else job.out / targets[index].folder


def written_in(out: Path) -> set[str]:
    """Return the names of what runs write into their folder, as far as it is there.

    The sums name a checkpoint's files, and are the first of them to come and the last to go.
    """
    named = {RUN, SUMS, RECORD, CARD, "additional_chat_templates", *read_sums(out)}
    matching = {x.name for pattern in (".*partial", ".*removed") for x in out.glob(pattern)}
    targets = {x.name for x in out.iterdir() if _TARGET.fullmatch(x.name) and x.is_dir()}
    return {x.name for x in out.iterdir()} & (named | matching | targets)


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
    with writing(out):
        doomed = out / f".{RUN}.removed"
        remove(doomed)
        if (out / RUN).exists():
            (out / RUN).replace(doomed)
    _remove(out, [path.name for path in out.iterdir()])


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other runs on this machine out of a folder for a while; it is made if it is not there.

    The folder itself is locked: runs may differ in users, containers and folders for temporary
    files.

    Raises:
        UserError: if one is at work there, or nothing can be written there.
    """
    _check_folder(out)
    _check_writable(out)
    with nothing_left(out):
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
        try:
            _lock(folder, out)
            yield
        finally:
            os.close(folder)


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another run is at work in --out {out}: name another folder") from error
    except OSError:  # NFS and others lock no folders
        pass


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Take back the empty folders that are made for a run that cannot begin."""
    made = [x for x in (folder, *folder.absolute().parents) if not x.exists()]
    try:
        yield
    except BaseException:
        for path in (folder / RUN, *made):
            with suppress(OSError):  # not empty, or not there
                path.rmdir()
        raise
