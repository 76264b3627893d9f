"""Which text is trained on and which is held out, and how what is read is shuffled."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import TypeVar

from nuteprune.data.readers import boundary, split_long

HELD_OUT_SHARE = 0.05
T = TypeVar("T")

# A document of more characters is split in itself, so that a book alone gives both parts. Below
# that, one passage would be too great a share of it.
_LONG = 2**14
_PASSAGE = 2**11  # most characters of its passages: more than a block of 256 tokens


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


def shuffled(
    items: Iterable[T], rng: random.Random, most: int, size_of: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Shuffle a stream: draw each item from a buffer of items with `most` characters in all."""
    held: list[T] = []
    size = 0
    for item in items:
        held.append(item)
        size += size_of(item)
        while size > most:
            drawn = rng.randrange(len(held))
            held[drawn], held[-1] = held[-1], held[drawn]
            size -= size_of(held[-1])
            yield held.pop()
    rng.shuffle(held)
    yield from held
