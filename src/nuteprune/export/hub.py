"""Files of checkpoints, in a folder or on the Hugging Face hub, and no links out of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from nuteprune.errors import UserError, in_one_line
from nuteprune.run_folder import RECORD, hidden


def record_path(source: str, **where: Any) -> Path | None:
    """Return the path of a checkpoint's record, None if it has none or the hub cannot tell.

    Args:
        source: a folder, or the name of a model on the hub.
        where: see `file_of`.
    """
    try:
        return file_of(source, RECORD, **where)
    except (UserError, HFValidationError):
        return None


def file_of(source: str, name: str, **where: Any) -> Path | None:
    """Return where a file of a checkpoint is, None if the checkpoint has none of that name.

    Args:
        source: a folder, or the name of a model on the hub.
        name: what the file is called.
        where: arguments of `hf_hub_download`, such as `revision`.

    Raises:
        UserError: if neither the hub nor the cache can tell.
    """
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, **where))
    except Exception as error:  # whatever the hub client and the network below it raise
        cached = _cached(source, name, where)
        if cached is not None:  # the file, or a mark that the hub has none
            return Path(cached) if isinstance(cached, str) else None
        unasked = isinstance(error, LocalEntryNotFoundError)  # which is an EntryNotFoundError too
        if isinstance(error, EntryNotFoundError) and not unasked:
            return None
        raise UserError(
            f"it cannot be told whether {source} has a {name} ({in_one_line(error)}); try again "
            "when the hub can be reached, or pass the folder of a complete download"
        ) from error


def folder_of(source: str, **where: Any) -> Path | None:
    """Return the folder of a model on this machine, None if it is not here, or is no model's name.

    Args:
        source: a folder, or the name of a model on the hub, which is looked up in the cache.
        where: arguments of `from_pretrained`; of these `revision` and `cache_dir` count.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        cached = _cached(source, "config.json", where)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _cached(source: str, name: str, where: Mapping[str, Any]) -> Any:
    here = {k: where[k] for k in ("revision", "cache_dir") if k in where}
    return try_to_load_from_cache(source, name, **here)


def check_inside(source: str, **where: Any) -> None:
    """Refuse a model with files outside its folder: a stranger's links are not followed.

    Links of the hub's cache, from `snapshots/REVISION` to `blobs`, are its own way to keep files.

    Args:
        source: a folder, or the name of a model on the hub.
        where: see `folder_of`.

    Raises:
        UserError: naming the file.
    """
    if (folder := folder_of(source, **where)) is None:
        return
    home = Path(os.path.realpath(folder))
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    for file in (x for x in folder.iterdir() if x.is_file() and not hidden(x)):
        real = Path(os.path.realpath(file))
        if not any(real.is_relative_to(x) for x in homes):
            raise UserError(
                f"{file} is a link to {real}, outside the model's folder, and is not followed; "
                "copy that file into the folder if you trust it"
            )
    for index in folder.glob("*.index.json"):
        for name in files_in(index):
            if name in ("", ".", "..") or "/" in name or "\\" in name:
                raise UserError(
                    f"{index} names {name!r}, which is no file of the model's folder; its weights "
                    "have to be beside it, by their plain names"
                )


def files_in(index: Path) -> set[str]:
    """Return the files that an index of weights names; none if it is not there or damaged."""
    try:
        names = json.loads(index.read_bytes())["weight_map"].values()
        return {str(x) for x in names}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # what loads it says so
        return set()
