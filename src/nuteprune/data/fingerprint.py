"""Hashes of text, whatever its name: by them some is held out, and some known as in-domain.

A fingerprint has hashes of documents and files.
"""

from __future__ import annotations

import hashlib
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

MAX_DOCUMENT_CHARS = 2**20  # a longer document counts as several, one after the other
HELD_OUT_SHARE = 0.05
MOST = 4096
"""Hashes that are kept of documents, and as many of files."""
_DIGITS = 16  # of a hash, in hexadecimal
# A document of more characters is split in itself, so that a book alone gives both parts. Below
# that, one passage would be too great a share of it.
_LONG, _PARAGRAPH = 2**14, 64  # characters of a long document, and of a paragraph that counts
_PASSAGE = 2**11  # most characters of its passages: more than a block of 256 tokens
_END = 2**20  # bytes that are hashed of a file at its beginning, and as many at its end

IN_DOMAIN: Final = "in-domain"
OTHER_TEXT: Final = "other text"
NOT_KNOWN: Final = "not known"
CHANCE = 0.01
"""Share of a text's documents that any two texts may have in common, such as short answers."""


def boundary(text: str, near: int) -> int:
    """Return where to cut a text: at its end, or after nearby white space.

    Args:
        text: the text.
        near: the latest position wanted, in characters.

    Returns:
        The position, at most `near`.
    """
    if near >= len(text):
        return len(text)
    start = max(0, near - 256)
    return max(text.rfind("\n", start, near), text.rfind(" ", start, near)) + 1 or near


def split_long(text: str, most: int | None = None) -> list[str]:
    """Cut a text into consecutive parts of at most `most` (`MAX_DOCUMENT_CHARS`) characters."""
    most = most or MAX_DOCUMENT_CHARS
    parts, start = [], 0
    while len(text) - start > most:
        window = text[start : start + most + 1]  # not all that is left: long texts have many parts
        end = start + boundary(window, most)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def split(document: str) -> tuple[list[str], list[str]]:
    """Split a document by its own text alone, without the white space around it.

    A short document is held out if the hash of its text is below a threshold. A long one is split
    by passages in the same way; at least one is held out and one is not, unless all are the same
    text.

    Args:
        document: the text.

    Returns:
        The stretches to train on, and those held out, in the document's order.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    for text in split_long(document):
        passages = _passages(text)
        hashes = [hashlib.blake2b(x.strip().encode(), digest_size=8) for x in passages]
        held_out = _below_threshold([int.from_bytes(x.digest(), "big") for x in hashes])
        ranked = zip(held_out, passages, strict=True)
        for held, stretch in itertools.groupby(ranked, key=itemgetter(0)):
            parts[held].append("".join(passage for _, passage in stretch))
    return parts


def held_out_part(documents: Iterable[str]) -> Iterator[str]:
    """Yield the held-out parts of documents, stretch by stretch."""
    for document in documents:
        yield from split(document)[1]


def _passages(text: str) -> list[str]:
    """Cut a long text into passages of about one length; a short one is its only passage."""
    bare = text.strip()
    if len(bare) <= _LONG:
        return [text]
    count = -(-len(bare) // _PASSAGE)
    cuts = [0, *(boundary(bare, len(bare) * i // count) for i in range(1, count)), len(bare)]
    return [bare[start:end] for start, end in itertools.pairwise(cuts)]


def _below_threshold(ranks: list[int]) -> list[bool]:
    threshold = HELD_OUT_SHARE * 2**64
    if len(ranks) > 1:
        threshold = min(max(threshold, min(ranks) + 1), max(ranks))
    return [rank < threshold for rank in ranks]


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
        judged: what perplexity was measured on, from `nuteprune.data.blocks.held_out_blocks`.
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
