"""Files that appear complete or not at all, and their checksums.

Sums are kept as `sha256sum` writes and checks them: `cd FOLDER && sha256sum -c SHA256SUMS`.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path
from safetensors import SafetensorError

from nuteprune.errors import RunFailed, UserError, in_one_line
from nuteprune.processes import rank
from nuteprune.run_folder import SUMS

WRONG_PLACE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.EINVAL, errno.EEXIST),
}
"""Errors that no second try mends: the user has to name another place."""
MOST_BYTES = 255
"""Length of a file's name, on most file systems."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file gets its own name when it is complete and on disk.

    Processes of one run may write the same file at once; what a killed one left is overwritten by
    the next try.

    Args:
        path: the file; one that is there is replaced.
    """
    partial = partial_of(path)
    try:
        yield partial
        follow_umask(partial)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        if str(error.filename) == str(partial):  # the user knows the file by its own name
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            partial.unlink()


def partial_of(path: Path) -> Path:
    """Return the path of an incomplete file: hidden, beside the file's own."""
    name = os.fsencode(path.name)
    short = path.name if len(name) <= MOST_BYTES - 50 else hashlib.sha256(name).hexdigest()
    return path.with_name(f".{short}.{rank()}.partial")


def data_files(path: Path) -> list[Path]:
    """Return the files of weights that are beside an ONNX file, or were."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.data"))


def check_room(path: Path, size: int) -> None:
    """Refuse to begin a file that its file system has no room for.

    Raises:
        RunFailed: if fewer than `size` bytes are free there.
    """
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise RunFailed(
            f"cannot write {path}: it takes {size:,} bytes, and {free:,} are free there; make room"
        )


def follow_umask(path: Path) -> None:
    """Give a file, or all files in a folder, the permissions of any other that the user writes.

    safetensors makes its files for their owner alone, and copies keep those of the package.
    """
    probe = (path if path.is_dir() else path.parent) / f".{path.name}.{rank()}.probe"
    # Nothing but a new file shows what the umask, or the folder's access list, makes of them.
    try:
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in path.rglob("*") if path.is_dir() else (path,):
        there = file.lstat().st_mode
        if stat.S_ISREG(there) and stat.S_IMODE(there) != mode:
            with suppress(OSError):  # of file systems that know no permissions
                file.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8: complete, or not at all."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def to_json(data: Any, indent: int | None = None) -> str:
    """Return data as JSON that every parser reads: null where a number is not finite."""
    return json.dumps(_finite(data), indent=indent, default=str, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk.

    Some file systems, network ones among them, cannot wait for a folder. Then its entries are on
    the disk when the system puts them there.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until all that is in a folder is on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


@contextmanager
def writing(what: str | Path, remedy: str = "") -> Iterator[None]:
    """Turn errors of writing into one line, inside the context.

    Args:
        what: the line's name for what is being written.
        remedy: how to go on after room was made.

    Raises:
        UserError: if nothing can be written at that place.
        RunFailed: if writing went wrong on the way: the disk is full, or the folder is gone.
    """
    try:
        yield
    # torch raises RuntimeError where its file could not be written.
    except (OSError, SafetensorError, RuntimeError) as error:
        # Without the name of a file that is hidden until it is complete.
        reason = getattr(error, "strerror", None) or in_one_line(error)
        if isinstance(error, OSError) and error.errno in WRONG_PLACE:
            raise UserError(f"cannot write {what}: {reason}") from error
        hint = f"; {remedy}" if remedy else ""
        raise RunFailed(f"cannot write {what}: {reason[:200]}{hint}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, complete or not at all, into a folder that is made if need be.

    Raises:
        UserError: if nothing can be written at that place.
        RunFailed: if writing went wrong on the way.
    """
    with writing(path, "make room and do the same again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, to_json(content, indent=2) + "\n")


def file_sum(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write the sums of a folder's files into it; files in folders below it are left out."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    lines = [f"{file_sum(folder / name)}  {name}\n" for name in names]
    write_text(folder / SUMS, "".join(lines))


def read_sums(folder: Path) -> dict[str, str]:
    """Return name -> SHA-256 from a folder's file of sums; empty if it has none.

    Raises:
        UserError: if the file of sums cannot be read as such.
    """
    path = folder / SUMS
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        # Other programs write " *NAME" of binary files, blank lines and comments.
        said = [x.replace(" *", "  ", 1) for x in lines if x.strip() and not x.startswith("#")]
        return {name: value.lower() for value, name in (x.split("  ", 1) for x in said)}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: its lines are not sums and names") from error


def damage(folder: Path, read: Callable[[str], bool] = lambda name: True) -> str | None:
    """Compare files with their sums, where a folder has any.

    Args:
        folder: the folder.
        read: name -> whether that file matters.

    Returns:
        What is wrong with the first damaged file; None if there is none.
    """
    for name, expected in read_sums(folder).items():
        path = folder / name
        if read(name) and not path.is_file():
            return f"{path} is gone"
        if read(name) and file_sum(path) != expected:
            return f"{path} is damaged or was changed: its SHA-256 is not the one in {SUMS}"
    return None


def at_home(path: str | Path) -> Path:
    """Return a path with a leading `~` as the home folder; as it is where there is no such user."""
    return Path(os.path.expanduser(path))  # unlike Path.expanduser, which raises


def cache_folder() -> Path:
    """Return the folder of downloads: `NUTEPRUNE_CACHE`, or the system's place for caches."""
    chosen = os.environ.get("NUTEPRUNE_CACHE")
    return at_home(chosen).absolute() if chosen else user_cache_path("nuteprune")


def check_name(name: str) -> None:
    """Refuse a name that no file can have here; Python would only say that no such file exists.

    Raises:
        UserError: with the name, and what to do.
    """
    if not name:
        raise UserError("a name is empty: is a variable not set?")
    try:
        name.encode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())
    except UnicodeEncodeError as error:
        advice = narrow_locale() or "the name is not UTF-8; rename it"
        raise UserError(f"{name[:100]!r}: {advice}") from error


def narrow_locale() -> str | None:
    """Return what to do where the locale cannot express all names; None where it can."""
    encoding = sys.getfilesystemencoding()
    if encoding.lower().replace("-", "") == "utf8":
        return None
    return (
        f"names of files are {encoding} under this locale, so other letters cannot be read; set "
        "PYTHONUTF8=1, or a UTF-8 locale such as LC_ALL=C.UTF-8"
    )


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
