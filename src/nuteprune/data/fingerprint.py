"""Fingerprints of text, whatever its name: hashes of its documents and files."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST = 4096
"""Hashes that are kept of documents, and as many of files."""
_DIGITS = 16  # of a hash, in hexadecimal
_LONG, _PARAGRAPH = 2**14, 64  # characters of a long document, and of a paragraph that counts
_END = 2**20  # bytes that are hashed of a file at its beginning, and as many at its end


class Fingerprint:
    """Hashes and names that tell which text this is.

    Args:
        stated: what `to_dict` returned of it.
        names: those that mean the same everywhere: datasets on the hub, and embedded sources.
    """

    def __init__(self, stated: Mapping[str, Any] | None = None, names: Iterable[str] = ()) -> None:
        stated = stated or {}
        self.names = {*names, *stated.get("names", ())}
        self.documents, self.files = (
            set(textwrap.wrap(stated.get(key, ""), _DIGITS)) for key in ("documents", "files")
        )

    def add_document(self, text: str) -> None:
        """Add a document without the white space around it; a long one by its paragraphs.

        So an edited book is recognised by its unchanged paragraphs.
        """
        bare = text.strip()
        parts = [x.strip() for x in bare.split("\n\n")] if len(bare) > _LONG else []
        parts = [x for x in parts if len(x) >= _PARAGRAPH] or [bare]
        _add(self.documents, (_hash(x.encode()) for x in parts if x))

    def add_file(self, path: Path) -> None:
        """Add a file: its size and both its ends, all of a small one."""
        with suppress(OSError), path.open("rb") as file:  # whoever reads it tells of an error
            size = path.stat().st_size
            start = file.read(_END)
            file.seek(max(len(start), size - _END))
            _add(self.files, [_hash(b"%d " % size + start + file.read(_END))])

    def update(self, other: Fingerprint) -> None:
        """Add all that another has."""
        self.names |= other.names
        _add(self.documents, other.documents)
        _add(self.files, other.files)

    def share_of(self, other: Fingerprint) -> float | None:
        """Return how much of another's documents is here, in [0, 1]; None where it cannot be told.

        The share is 1 where both have a file or a name in common. Else it is that of the documents
        that this fingerprint would keep, had they been added.
        """
        if self.names & other.names or self.files & other.files:
            return 1.0
        kept = _smallest(self.documents)
        told = [x for x in other.documents if len(kept) < MOST or x <= kept[-1]]
        return len({*told} & {*kept}) / len(told) if told else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fingerprint for JSON: hashes in growing order, one after the other."""
        hashes = {"documents": self.documents, "files": self.files}
        kept = {key: "".join(_smallest(found)) for key, found in hashes.items()}
        return {**kept, "names": sorted(self.names)}


def _hash(content: bytes) -> str:
    # Another hash than that by which documents are held out, else all that is kept would be those.
    return hashlib.blake2b(content, digest_size=_DIGITS // 2, person=b"fingerprint").hexdigest()


def _smallest(hashes: Iterable[str]) -> list[str]:
    """Return the hashes to keep: a sample that does not depend on their order."""
    return sorted(hashes)[:MOST]


def _add(hashes: set[str], more: Iterable[str]) -> None:
    hashes.update(more)
    if len(hashes) > 4 * MOST:  # a source may have any number of documents
        hashes.intersection_update(_smallest(hashes))
