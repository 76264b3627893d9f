"""The text that judges: the part of each source that no run trains on, and its blocks.

Shape suffixes: N blocks, T tokens of a block.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nuteprune.data.fingerprint import LONG, Fingerprint
from nuteprune.data.readers import boundary, split_long
from nuteprune.data.specs import DEMO, check_distinct, iter_documents
from nuteprune.data.tokens import after, bos_of, check_ids, collect, tokens_of, too_short
from nuteprune.errors import UserError
from nuteprune.run_folder import SELF

HELD_OUT_SHARE = 0.05
"""Share of a text's documents that are held out. A document of more characters than `LONG` is split
in itself, so that a book alone gives both parts; below that, one passage would be too great a share
of it."""
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
    if len(bare) <= LONG:
        return [text]
    count = -(-len(bare) // _PASSAGE)
    cuts = [0, *(boundary(bare, len(bare) * i // count) for i in range(1, count)), len(bare)]
    return [bare[start:end] for start, end in itertools.pairwise(cuts)]


def _below_threshold(ranks: list[int]) -> list[bool]:
    threshold = HELD_OUT_SHARE * 2**64
    if len(ranks) > 1:
        threshold = min(max(threshold, min(ranks) + 1), max(ranks))
    return [rank < threshold for rank in ranks]


class HeldOut(dict[str, Tensor]):
    """Blocks to judge by, source name -> (n, length), and the fingerprint of each source."""

    def __init__(self) -> None:
        super().__init__()
        self.fingerprints: dict[str, Fingerprint] = {}


def held_out_blocks(
    spec: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    text_column: str | None = None,
    vocab_size: int | None = None,
) -> HeldOut:
    """Cut the held-out part of each source into blocks, in the source's order.

    Self-written text has no held-out part. Where there is no other text, that of `demo` is used.

    Args:
        spec: the DATA spec, or several.
        tokenizer: the model's tokenizer.
        length: tokens per block, at least 2.
        count: most blocks per source, at least 1.
        text_column: the column that holds the text; None finds it.
        vocab_size: the model's number of token ids; None does not check them.

    Returns:
        Source name -> token ids (n, length), 1 <= n <= count.

    Raises:
        UserError: a source cannot be read or its held-out part is shorter than a block, or the
            tokenizer is of another model.
    """
    check_size(length, count)
    bos = bos_of(tokenizer)
    read = length - len(bos)
    specs = [spec] if isinstance(spec, str) else spec
    others = [name for name in specs if name != SELF] or [DEMO]
    held_out = HeldOut()
    for name in others:
        found = iter_documents(name, text_column=text_column, tokenizer=tokenizer)
        for source in found.values():
            tokens = collect(tokens_of(held_out_part(source), tokenizer), count * read)
            whole = len(tokens) // read
            if not whole:
                part = f"{source.name} (its held-out part, about 5 %)"
                raise too_short(part, len(tokens), length, "other text to judge by (--eval-data), ")
            blocks = after(bos, tokens[: whole * read].view(whole, read))
            check_ids(blocks, vocab_size)
            # Files of one name in different folders are told apart by their specs.
            called = name if source.name in held_out else source.name
            check_distinct(called, held_out)
            held_out[called] = blocks.long()
            held_out.fingerprints[called] = source.fingerprint
    return held_out


def check_size(length: int, count: int) -> None:
    """Refuse blocks that hold nothing to predict, and none at all."""
    if length < 2 or count < 1:
        raise UserError(
            f"{count} blocks of {length} tokens: pass at least 1 block of at least 2 tokens"
        )
