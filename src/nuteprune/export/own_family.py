"""Entries of families that are not listed: they travel in the record of what was pruned by them."""

from __future__ import annotations

import json
import os
from typing import Any

from nuteprune.export.hub import record_path
from nuteprune.model.family_file import from_dict, to_dict
from nuteprune.model.lookup import bring_along, brought_along

KEY = "family"
"""Where a record has the entry."""


def of_record(model_type: str) -> dict[str, Any]:
    """Return what a record is to say of a model type's family: nothing if it is a listed one."""
    family = brought_along(model_type)
    return {} if family is None else {KEY: to_dict(family)}


def bring_from(source: str | os.PathLike[str], **where: Any) -> None:
    """Let this process know the family that a checkpoint's record describes, if it does.

    Args:
        source: a folder, or the name of a model on the hub.
        where: what more says where on the hub; see `hub.record_path`.

    Raises:
        UserError: if what the record says of it makes no sense.
    """
    if (path := record_path(source, **where)) is None:
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what reads the record says so
        return
    if isinstance(record, dict) and KEY in record:
        bring_along(from_dict(record[KEY], path))
