"""The guard before all writing and removing: existing files and input files stay.

Commands ask it before their work, so that hours are not spent on what cannot be written.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from nuteprune.data.specs import DEMO
from nuteprune.errors import UserError
from nuteprune.files import at_home, cache_folder, writing
from nuteprune.jobs.folder import begun, written_in
from nuteprune.jobs.job import Job, VocabJob
from nuteprune.processes import is_main
from nuteprune.run_folder import RUN, SELF, SELF_WRITTEN, SETTINGS, hidden

Reads = Iterable[tuple[str, str | None]]
"""An input of a command: what it is, in words, and the name that the user gave."""
_TEXTS = ("data", "eval data")
"""Kinds of inputs that are read with all files in and below their folder."""
_NOT_LOADED = (".gguf", ".onnx", ".data")
"""Endings of files that may be in a model's folder, and that no model is loaded from."""
_BLOCK = 4096
"""Bytes written as a trial: a full disk still takes a file's name."""


def check_file(
    option: str,
    path: Path,
    reads: Reads,
    overwrite: bool,
    example: str,
    beside: Iterable[Path] = (),
) -> None:
    """Refuse an output file that exists, is also an input, or cannot be written.

    Args:
        option: the option that names it.
        path: the file.
        reads: what the command reads.
        overwrite: whether it may be replaced.
        example: how a file is called there, where a folder was named.
        beside: files that are replaced together with it.

    Raises:
        UserError: saying what to pass instead.
        RunFailed: if the disk is full.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, which raises for a name that is too long
        named = path / example
        raise UserError(f"{option} {path} is a folder; name the file to write, such as {named}")
    if kept := _read_from(path, reads):
        raise UserError(
            f"{option} {path} belongs to the {kept}, which would be lost; name another file"
        )
    check_absent((path, *beside), overwrite, "name another file")
    check_writable(option, path)


def check_absent(paths: Iterable[Path], overwrite: bool, instead: str) -> None:
    """Refuse to replace existing files, unless told to; broken links count as files.

    Raises:
        UserError: naming the first file, and what to do.
    """
    there = None if overwrite else next(filter(os.path.lexists, paths), None)
    if there is not None:
        raise UserError(f"{there} exists; pass --overwrite to replace it, or {instead}")


def check_writable(option: str, path: Path) -> None:
    """Refuse a path whose nearest existing folder takes no file.

    Raises:
        UserError: if a second try cannot help.
        RunFailed: if the disk is full.
    """
    with writing(f"{option} {path}", "make room and do the same again"):
        with suppress(FileNotFoundError):
            path.lstat()  # a name that is too long
        there = next(x for x in (path.absolute(), *path.absolute().parents) if x.is_dir())
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(bytes(_BLOCK))
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError as error:  # a folder of the kernel's own, as /proc
            raise UserError(f"cannot write {option} {path}: {there} takes no files") from error


def _check_folder(out: Path) -> None:
    if out.is_symlink() and not out.exists():
        raise UserError(f"--out {out} is a link to {out.readlink()}, which is not there")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")


def _read_from(out: Path, reads: Reads) -> str | None:
    """Return the input in `reads` that an output path is, or contains."""
    target = _real(out)
    for what, named in reads:
        if any(_real(x).is_relative_to(target) for x in _files(what, named)):
            return f"{what} {named}"
    return None


def _files(what: str, named: str | None) -> Iterator[Path]:
    """Yield the input files and folders that are on this machine."""
    if not named or named == SELF:
        return
    place = cache_folder() if named == DEMO else at_home(named)
    if what == "model" and not place.exists():
        from nuteprune.export.hub import folder_of  # the hub's client takes its time

        place = folder_of(named) or place
    if place.exists():
        yield place
    if place.is_dir():
        deep = what in _TEXTS or named == DEMO
        found = place.rglob("*") if deep else place.iterdir()
        yield from (x for x in found if x.suffix not in _NOT_LOADED and not x.is_dir())


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, which raises for links in a circle


def check_out(job: Job) -> None:
    """Refuse an output folder with something in it, unless told what to do with it.

    Raises:
        UserError: if the folder is in the way, or there is nothing to resume in it.
    """
    out = job.out
    texts = [("data", spec) for spec in job.specs]
    texts += [("eval data", job.eval_data)] if job.eval_data else []
    files = [("settings", str(file)) for file in job.files]
    if kept := _read_from(out, [("model", job.model), *texts, *files]):
        raise UserError(f"--out {out} holds the {kept}; name another folder")
    for what, named in texts:
        place = at_home(named)
        inside = named not in ("", DEMO, SELF) and _real(out).is_relative_to(_real(place))
        if inside and place.is_dir():
            raise UserError(
                f"--out {out} is inside the {what} {named}, and what the run writes would be read "
                "as text; name a folder outside"
            )
    if job.overwrite and any(_real(x).is_relative_to(_real(out)) for x in _around_the_user()):
        raise UserError(
            f"--out {out} holds the home folder, a cache of models or the folder that you are in, "
            "and --overwrite would remove all of it; name another folder"
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
        resumes = not isinstance(job, VocabJob)
        raise UserError(
            f"--out {out} is not empty; name another folder, or pass --overwrite to replace it"
            + (" or --resume to go on with it" if resumes and begun(out) else "")
        )


def check_free(job: Job) -> None:
    """Refuse a folder that the job cannot write to; fast, since no library is loaded for it.

    The job asks again, when it holds the folder. Errors as of `check_out`.
    """
    if is_main():
        with alone(job.out) if job.out.is_dir() else nullcontext():
            check_out(job)


def _around_the_user() -> Iterator[Path]:
    yield from (at_home("~"), cache_folder(), Path(HF_HUB_CACHE))
    with suppress(OSError):  # a folder that is gone
        yield Path.cwd().parent


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other runs on this machine out of a folder for a while; it is made if it is not there.

    The folder itself is locked: runs may differ in users, containers and folders for temporary
    files.

    Raises:
        UserError: if another run is at work there, or nothing can be written there.
        RunFailed: if the disk is full.
    """
    _check_folder(out)
    check_writable("--out", out)
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
    """Remove the empty folders made for a run that cannot begin."""
    made = [x for x in (folder, *folder.absolute().parents) if not x.exists()]
    try:
        yield
    except BaseException:
        for path in (folder / RUN, *made):
            with suppress(OSError):  # not empty, or not there
                path.rmdir()
        raise
