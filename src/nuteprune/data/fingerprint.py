"""Hashes of a text's documents and files, by which it is known as in-domain whatever its name."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

MOST = 4096
"""Hashes that are kept of documents, and as many of files."""
_DIGITS = 16  # of a hash, in hexadecimal
LONG, _PARAGRAPH = 2**14, 64  # characters of a long document, and of a paragraph that counts
_END = 2**20  # bytes that are hashed of a file at its beginning, and as many at its end

IN_DOMAIN: Final = "in-domain"
OTHER_TEXT: Final = "other text"
NOT_KNOWN: Final = "not known"
CHANCE = 0.01
"""Share of a text's documents that any two texts may have in common, such as short answers."""


class Fingerprint:
    """Hashes and names that tell which text this is.

    Args:
        stated: what `to_dict` returned of it.
        names: those that mean the same everywhere: datasets on the hub, and embedded sources.
    """

    def __init__(self, stated: Mapping[str, Any] | None = None, names: Iterable[str] = ()) -> None:
        stated = stated or {}
        self.names = {*names, *stated.get("names", ())}
        told = (stated.get(key, "") for key in ("documents", "files"))
        self.documents, self.files = (set(textwrap.wrap(x, _DIGITS)) for x in told)

    def add_document(self, text: str) -> None:
        """Add a document without the white space around it; a long one by its paragraphs.

        So an edited book is recognised by its unchanged paragraphs.
        """
        bare = text.strip()
        parts = [x.strip() for x in bare.split("\n\n")] if len(bare) > LONG else []
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


# -- what a model learned from, and what that makes of other text


def learned_from(record: Mapping[str, Any]) -> list[Fingerprint | None]:
    """Return the texts that each run of a model read, by its record; None: unknown.

    Args:
        record: its nuteprune.json. Earlier prunings and recoveries count too.
    """
    before = [x for earlier in record.get("history", ()) for x in learned_from(earlier)]
    runs = [record] if "text" in record or record.get("config", {}).get("data") else []
    entry = record.get("recover")
    while entry:
        runs.append(entry)
        entry = entry.get("earlier")
    return before + [Fingerprint(run["text"]) if "text" in run else None for run in runs]


def kind_of(judged: Fingerprint, learned: Iterable[Fingerprint | None]) -> str:
    """Return whether a text is `IN_DOMAIN` or `OTHER_TEXT` for a model, or `NOT_KNOWN`.

    A text is in-domain if it shares a file or a public name with the training text, or more than
    `CHANCE` of its documents. It is other text only if it shares no document, and if every run's
    record would show at least one of its documents, had the run read it.

    Args:
        judged: fingerprint of the text's source.
        learned: from `learned_from`.
    """
    shares = [None if run is None else run.share_of(judged) for run in learned]
    if any(share is not None and share > CHANCE for share in shares):
        return IN_DOMAIN
    return OTHER_TEXT if all(share == 0 for share in shares) else NOT_KNOWN


def text_entry(
    learned: Any, judged: Any, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what a record says of a run's text, as `text`.

    Args:
        learned: the data set that was trained on; one without a `fingerprint` is not known.
        judged: what perplexity was measured on, from `nuteprune.data.held_out.held_out_blocks`.
        earlier: the record of the model before this run, if there is one.

    Returns:
        `documents`, `files`, `names` (see `Fingerprint`), and `judged`: source -> its kind.
    """
    known = [*learned_from(earlier or {}), learned.fingerprint]
    kinds = {source: kind_of(x, known) for source, x in judged.fingerprints.items()}
    return {**learned.fingerprint.to_dict(), "judged": kinds}


def text_kind(record: Mapping[str, Any]) -> str | None:
    """Return whether a record's perplexities are on in-domain or other text; None: unknown.

    Args:
        record: its nuteprune.json.
    """
    run = record.get("recover", record)
    kinds = set(run.get("text", {}).get("judged", {}).values())
    if IN_DOMAIN in kinds:
        return f"{IN_DOMAIN} text"
    return OTHER_TEXT if kinds == {OTHER_TEXT} else None
