"""Which documents are trained on and which are held out: the same in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from nuteprune.data.readers import boundary

HELD_OUT_SHARE = 0.05

# With this many documents a source has one in its held-out part, but for a chance of 2e-6.
_MANY_DOCUMENTS = 256

Rule = Callable[[str], tuple[str, str]]


def split_rule(documents: Iterable[str]) -> Rule:
    """Choose how the documents of a source go into its training and its held-out part.

    A document is ranked by a hash of its text, and the lowest ranks are held out: among many
    documents those below a threshold, among few as many as make up the share of the text, the last
    of which is divided so that even a single document gives both parts.

    Args:
        documents: a source that can be iterated over again; its first documents are read.

    Returns:
        The rule: document -> its text to train on and its text held out; either may be empty.

    Raises:
        UserError: the source cannot be read.
    """
    lengths: dict[int, int] = {}
    for document in documents:
        lengths[_rank(document)] = len(document)
        if len(lengths) == _MANY_DOCUMENTS:
            return _by_threshold
    left = round(HELD_OUT_SHARE * sum(lengths.values()))
    held_out = {}
    for rank in sorted(lengths):
        held_out[rank] = min(left, lengths[rank])
        left -= held_out[rank]
    return partial(_by_length, held_out)


def _rank(document: str) -> int:
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big")


def _by_threshold(document: str) -> tuple[str, str]:
    held_out = _rank(document) < HELD_OUT_SHARE * 2**64
    return ("", document) if held_out else (document, "")


def _by_length(held_out: Mapping[int, int], document: str) -> tuple[str, str]:
    """Hold out the last characters of a document, as many as its rank has."""
    cut = boundary(document, len(document) - held_out.get(_rank(document), 0))
    return document[:cut], document[cut:]
