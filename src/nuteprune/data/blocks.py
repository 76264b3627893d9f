"""Text as blocks of tokens: what is trained on, and what is held out to judge by.

A DATA spec is `demo` (three embedded sources), a `.txt`, `.jsonl`, `.json` or `.parquet` file, a
folder of such files, or a dataset on the hub as `id[:config[:split]]`.
"""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nuteprune.data import demo as assets
from nuteprune.data import readers
from nuteprune.data.split import split_rule
from nuteprune.errors import UserError
from nuteprune.files import at_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO = "demo"

_SHUFFLE_CHARS = 2**24  # how much text is held to draw the next passage from
_PASSAGE_CHARS = 8  # of a passage, per token of a block: about two blocks of English
_HUB_SPEC = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:\\]*){0,2}")


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


def iter_documents(
    spec: str,
    *,
    text_column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, readers.Documents]:
    """Find the sources of a DATA spec; files and the hub are read when iterated over.

    Args:
        spec: the DATA spec.
        text_column: the column that holds the text; None finds it.
        tokenizer: renders rows of chat messages; may be None where there are none.

    Returns:
        Source name -> its documents, each of at most `readers.MAX_DOCUMENT_CHARS` characters.

    Raises:
        UserError: nothing of that name, or (on iteration) a source cannot be read.
    """
    return {source.name: source for source in _sources(spec, text_column, tokenizer)}


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
    sources = _sources(spec, text_column, tokenizer)
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
    for source in _sources(spec, text_column, tokenizer):
        texts = (held for _, held in map(split_rule(source), source))
        tokens = collect(tokens_of(texts, tokenizer), count * read)
        whole = len(tokens) // read
        if not whole:
            raise too_short(f"{source.name} (its held-out part)", len(tokens), length)
        blocks = after(bos, tokens[: whole * read].view(whole, read))
        check_ids(blocks, vocab_size)
        held_out[source.name] = blocks.long()
    return held_out


def _sources(
    spec: str, text_column: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[readers.Documents]:
    if spec == DEMO:
        return [
            readers.Documents(name, partial(iter, texts))
            for name, texts in assets.documents().items()
        ]
    options: dict[str, Any] = {"text_column": text_column, "tokenizer": tokenizer}
    if (files := local_files(spec)) is not None:
        read = partial(readers.file_documents, **options)
        name = at_home(spec).absolute().name or spec
        return [readers.Documents(name, lambda: itertools.chain.from_iterable(map(read, files)))]
    return [readers.Documents(spec, partial(readers.hub_documents, *hub_parts(spec), **options))]


def local_files(spec: str) -> list[Path] | None:
    """Return the files of a DATA spec, None if it is no path.

    Raises:
        UserError: it looks like a path, and nothing is there.
    """
    path = at_home(spec)
    if spec and os.path.exists(path):
        return readers.text_files(path)
    if path.suffix.lower() in readers.SUFFIXES or not _HUB_SPEC.fullmatch(spec):
        raise UserError(
            f"{spec!r}: no such file or folder; pass {DEMO}, a path, or a hub dataset as "
            "id[:config[:split]]"
        )
    return None


def hub_parts(spec: str) -> tuple[str, str | None, str]:
    """Return dataset, configuration and split that a DATA spec names on the hub."""
    dataset, config, split = (*spec.split(":"), "", "")[:3]
    return dataset, config or None, split or "train"


def _training_tokens(
    source: readers.Documents, tokenizer: PreTrainedTokenizerBase, rng: random.Random, length: int
) -> Iterator[list[int]]:
    """Yield the tokens of the training part over and over, in an order drawn for each pass.

    Long documents come in passages, lest a small budget be spent on a few of them.
    """
    rule, passage = split_rule(source), _PASSAGE_CHARS * length
    while True:
        documents = (trained for trained, _ in map(rule, source))
        texts = (piece for x in documents for piece in readers.split_long(x, passage))
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


def tokens_of(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the tokens of each text, ended by the token that joins it to the next, if any.

    Args:
        texts: documents; empty ones are left out.
        tokenizer: the model's tokenizer; no special tokens are added but eos (else bos) at the end.
    """
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    end = [token for token in ends if token is not None][:1]
    for text in filter(None, texts):
        if tokens := tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]:
            yield [*tokens, *end]


def bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that a tokenizer puts before every text, as a list; empty if it does not.

    Models that saw it before every text in training (Gemma above all) fail without it.
    """
    bos = tokenizer.bos_token_id
    starts = bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
    return [bos] if starts else []


def after(first: Sequence[int], blocks_NT: Tensor) -> Tensor:
    """Return blocks (N, T) with the same tokens before each of them."""
    start = torch.tensor(list(first), dtype=blocks_NT.dtype)
    start = start.expand(len(blocks_NT), len(first))
    return torch.cat([start, blocks_NT], dim=1)


def collect(pieces: Iterable[list[int]], most: int) -> Tensor:
    """Join pieces to the first `most` tokens (n,), n <= most; reads no further.

    Args:
        pieces: token ids, piece by piece.
        most: the number of tokens wanted.
    """
    parts = [torch.empty(0, dtype=torch.int32)]
    for tokens in pieces:
        parts.append(torch.tensor(tokens[:most], dtype=torch.int32))
        most -= len(parts[-1])
        if not most:
            break
    return torch.cat(parts)


def _check_size(length: int, count: int) -> None:
    if length < 2 or count < 1:
        raise UserError(
            f"{count} blocks of {length} tokens: pass at least 1 block of at least 2 tokens"
        )


def check_ids(blocks: Tensor, vocab_size: int | None) -> None:
    """Refuse token ids that a model does not know; None does not check them.

    Raises:
        UserError: the tokenizer is of another model.
    """
    if vocab_size is not None and (highest := int(blocks.max())) >= vocab_size:
        raise UserError(
            f"the tokenizer gives token id {highest}, but the model knows {vocab_size} ids; "
            "pass the tokenizer that belongs to the model"
        )


def check_positions(length: int, config: Any) -> None:
    """Refuse blocks longer than what a model knows positions for.

    Raises:
        UserError: naming both.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(
            f"length is {length}, and the model knows {positions} positions; pass a shorter one"
        )


def too_short(name: str, seen: int, length: int) -> UserError:
    """Return the error for a text of `seen` tokens that gives no block of `length`."""
    return UserError(
        f"{name}: {seen} tokens, and a block takes {length}; "
        "pass more text or a shorter block length"
    )
