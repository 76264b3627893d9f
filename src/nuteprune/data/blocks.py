"""Text as blocks of tokens: what is trained on, and what is held out to judge by."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nuteprune.data.readers import Documents, split_long
from nuteprune.data.specs import sources_of
from nuteprune.data.split import held_out_part, split
from nuteprune.data.tokens import after, bos_of, check_ids, collect, tokens_of, too_short
from nuteprune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHUFFLE_CHARS = 2**24  # how much text is held to draw the next passage from
_PASSAGE_CHARS = 8  # of a passage, per token of a block: about two blocks of English


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Blocks of tokens to train on: the labels are the tokens themselves.

    Args:
        blocks: token ids (count, length), of any integer type.
    """

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index].long()
        return {"input_ids": block, "labels": block.clone()}


def training_blocks(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int,
    text_column: str | None = None,
    vocab_size: int | None = None,
) -> BlockDataset:
    """Cut the training part of a DATA spec into blocks, the sources taking turns.

    Documents, long ones in passages, come in an order drawn by the seed, over and over where the
    text is short; of a huge source only the beginning is read. A tokenizer's bos begins each block.

    Args:
        spec: the DATA spec.
        tokenizer: the model's tokenizer.
        length: tokens per block, at least 2.
        count: number of blocks, at least 1.
        seed: draws the order of the passages and of the blocks.
        text_column: the column that holds the text; None finds it.
        vocab_size: the model's number of token ids; None does not check them.

    Returns:
        `count` blocks (length,).

    Raises:
        UserError: a source cannot be read or is shorter than a block, or the tokenizer is of
            another model.
    """
    _check_size(length, count)
    sources = sources_of(spec, text_column, tokenizer)
    bos = bos_of(tokenizer)
    read = length - len(bos)
    blocks = torch.empty(count, read, dtype=torch.int32)
    for turn, source in enumerate(sources):
        share = len(range(turn, count, len(sources)))
        rng = random.Random(f"{seed} {source.name}")
        tokens = collect(_training_tokens(source, tokenizer, rng, read), share * read)
        order = rng.sample(range(share), share)
        blocks[turn :: len(sources)] = tokens.view(share, read)[order]
    blocks = after(bos, blocks)
    check_ids(blocks, vocab_size)
    return BlockDataset(blocks)


def held_out_blocks(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    text_column: str | None = None,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Cut the held-out part of each source of a DATA spec into blocks, in the source's order.

    Args:
        spec: the DATA spec.
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
    _check_size(length, count)
    bos = bos_of(tokenizer)
    read = length - len(bos)
    held_out = {}
    for source in sources_of(spec, text_column, tokenizer):
        tokens = collect(tokens_of(held_out_part(source), tokenizer), count * read)
        whole = len(tokens) // read
        if not whole:
            part = f"{source.name} (its held-out part)"
            raise too_short(part, len(tokens), length, "other text to judge by (--eval-data), ")
        blocks = after(bos, tokens[: whole * read].view(whole, read))
        check_ids(blocks, vocab_size)
        held_out[source.name] = blocks.long()
    return held_out


def _training_tokens(
    source: Documents, tokenizer: PreTrainedTokenizerBase, rng: random.Random, length: int
) -> Iterator[list[int]]:
    """Yield the tokens of the training part over and over, in an order drawn for each pass.

    Long documents come in passages, lest a small budget be spent on a few of them.
    """
    most = _PASSAGE_CHARS * length
    while True:
        # A document that is held out leaves an empty text in the order that is drawn.
        stretches = (stretch for document in source for stretch in split(document)[0] or [""])
        texts = (passage for x in stretches for passage in split_long(x, most))
        seen = 0
        for tokens in tokens_of(_shuffled(texts, rng), tokenizer):
            seen += len(tokens)
            yield tokens
        if seen < length:
            raise too_short(f"{source.name} (its training part)", seen, length)


def _shuffled(texts: Iterable[str], rng: random.Random) -> Iterator[str]:
    """Draw each next text from those held, at most `_SHUFFLE_CHARS` characters in all."""
    held: list[str] = []
    chars = 0
    for text in texts:
        held.append(text)
        chars += len(text)
        while chars > _SHUFFLE_CHARS:
            drawn = rng.randrange(len(held))
            held[drawn], held[-1] = held[-1], held[drawn]
            chars -= len(held[-1])
            yield held.pop()
    rng.shuffle(held)
    yield from held


def _check_size(length: int, count: int) -> None:
    if length < 2 or count < 1:
        raise UserError(
            f"{count} blocks of {length} tokens: pass at least 1 block of at least 2 tokens"
        )
