"""The text of a run: the blocks that it trains on, with what the model wrote, and what calibrates.

Shape suffixes: N blocks, R of them repeats, T tokens of a block, M = N x T.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from nuteprune.data.fingerprint import Fingerprint
from nuteprune.data.held_out import HeldOut, check_size, held_out_blocks, split
from nuteprune.data.readers import Documents, shuffled, split_long
from nuteprune.data.specs import iter_documents
from nuteprune.data.tokens import after, bos_of, check_ids, collect, tokens_of, too_short
from nuteprune.errors import UserError
from nuteprune.run_folder import SELF

REPEATS = 5
"""One block of self-written text in so many is shuffled tokens that come twice."""
JUDGED = 4
"""Blocks that a job judges a model by in one pass."""
_SHUFFLE_CHARS = 2**24  # how much text is held to draw the next passage from
_PASSAGE_CHARS = 8  # of a passage, per token of a block: about two blocks of English


@dataclass
class TrainingText:
    """Text for one model.

    Args:
        specs: DATA specs; `self` is what the model writes.
        shares: of the tokens, one for each spec.
        tokenizer: the model's.
        length: tokens per block.
        count: blocks to train on.
        to_write: tokens that the model writes itself, 0 where it has no share.
        seed: draws the order of passages and blocks.
        how: `text_column` and `vocab_size`, as `training_blocks` takes them.
        written: what the model has written before the run; None: nothing.

    Raises:
        UserError: if the text cannot be had, or does not suit the model.
    """

    specs: Sequence[str]
    shares: Sequence[float]
    tokenizer: PreTrainedTokenizerBase
    length: int
    count: int
    to_write: int
    seed: int
    how: Mapping[str, Any]
    written: Sequence[list[int]] | None = None
    training: BlockDataset = field(init=False)

    def __post_init__(self) -> None:
        # Until the model has written its own, something of the same size stands in for it.
        self.training = self._blocks(self.written or [[0] * self.length])

    def use_written(self, written: Sequence[list[int]]) -> None:
        """Train on what the model has written, where it has a share.

        Args:
            written: token ids of each text, as `stages.write` returns them.
        """
        self.training.blocks = self._blocks(written).blocks

    def _blocks(self, written: Sequence[list[int]]) -> BlockDataset:
        return training_blocks(
            self.specs,
            self.tokenizer,
            length=self.length,
            count=self.count,
            seed=self.seed,
            shares=self.shares,
            written=written,
            **self.how,
        )

    def held_out(self, specs: str | Sequence[str], count: int) -> HeldOut:
        """Return blocks to judge by, source -> (N, T), N at most `count`."""
        return held_out_blocks(specs, self.tokenizer, length=self.length, count=count, **self.how)


# -- blocks


@dataclass(eq=False, repr=False)
class BlockDataset(Dataset[dict[str, Tensor]]):
    """Blocks of tokens to train on: the labels are the tokens themselves.

    Args:
        blocks: token ids (count, length), of any integer type.
        fingerprint: fingerprint of the text that they are cut from, if there is one.
    """

    blocks: Tensor
    fingerprint: Fingerprint = field(default_factory=Fingerprint)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index].long()
        return {"input_ids": block, "labels": block.clone()}


def collated(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Collate items of equal length; columns that nothing reads are left out.

    Args:
        items: `input_ids` and maybe `attention_mask` and `labels` (T,).

    Raises:
        UserError: if their lengths differ.
    """
    lengths = {len(item["input_ids"]) for item in items}
    if len(lengths) > 1:
        raise UserError(
            f"items of train_dataset have {min(lengths)} to {max(lengths)} tokens: cut text into "
            "blocks of one length, or pass a data_collator that pads"
        )
    names = [x for x in ("input_ids", "attention_mask", "labels") if x in items[0]]
    return {x: torch.stack([torch.as_tensor(item[x]) for item in items]) for x in names}


def training_blocks(
    spec: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int,
    shares: Sequence[float] | None = None,
    written: Sequence[list[int]] = (),
    text_column: str | None = None,
    vocab_size: int | None = None,
) -> BlockDataset:
    """Cut training text into blocks: each spec by its share, the sources of a spec equally.

    Documents, long ones in passages, come in an order drawn by the seed, over and over where the
    text is short; of a huge source only the beginning is read. A tokenizer's bos begins each block.

    Args:
        spec: the DATA spec, or several; `self` is what the model has written.
        tokenizer: the model's tokenizer.
        length: tokens per block, at least 2.
        count: number of blocks, at least 1.
        seed: draws the order of the passages and of the blocks.
        shares: share of the tokens of each spec, in any unit; None: equal shares.
        written: the texts of `self`, from `nuteprune.stages.write.write`.
        text_column: the column that holds the text; None finds it.
        vocab_size: the model's number of token ids; None does not check them.

    Returns:
        `count` blocks (length,). Any run of blocks has about the right share of each spec.

    Raises:
        UserError: a source cannot be read or is shorter than a block, shares are not as many as
            specs, or the tokenizer is of another model.
    """
    check_size(length, count)
    specs = [spec] if isinstance(spec, str) else list(spec)
    whose = torch.tensor(turns(checked_shares(shares, specs), count))
    bos = bos_of(tokenizer)
    read = length - len(bos)
    blocks, known = torch.empty(count, read, dtype=torch.int32), Fingerprint()
    for index, name in enumerate(specs):
        own = torch.nonzero(whose == index).flatten()
        texts: list[Documents | Sequence[list[int]]] = [written]
        if name != SELF:
            texts = [*iter_documents(name, text_column=text_column, tokenizer=tokenizer).values()]
        for turn, text in enumerate(texts):
            places = own[turn :: len(texts)]
            blocks[places] = _drawn_blocks(text, tokenizer, read, len(places), seed)
            if isinstance(text, Documents):
                known.update(text.fingerprint)
    blocks = after(bos, blocks)
    check_ids(blocks, vocab_size)
    return BlockDataset(blocks, known)


def turns(shares: Sequence[float], count: int) -> list[int]:
    """Deal out `count` turns by shares, so that each has about its share at any time.

    Args:
        shares: in any unit, each above 0.
        count: the number of turns.

    Returns:
        The index of the share whose turn it is, turn by turn.
    """
    had, whole = [0] * len(shares), sum(shares)
    found = []
    for turn in range(1, count + 1):
        behind = [turn * share / whole - n for share, n in zip(shares, had, strict=True)]
        found.append(behind.index(max(behind)))
        had[found[-1]] += 1
    return found


def checked_shares(shares: Sequence[float] | None, specs: Sequence[str]) -> Sequence[float]:
    """Return the shares of the text, equal ones for None.

    Args:
        shares: in any unit.
        specs: the DATA specs that they belong to.

    Raises:
        UserError: if they are not as many as the specs, or one is not above 0.
    """
    shares = [1.0] * len(specs) if shares is None else shares
    good = bool(specs) and all(share > 0 and math.isfinite(share) for share in shares)
    if len(shares) != len(specs) or not good:
        raise UserError(
            f"shares {', '.join(map(str, shares))} of the text {', '.join(specs)}: pass one number "
            "above 0 for each"
        )
    return shares


def _drawn_blocks(
    text: Documents | Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int,
) -> Tensor:
    """Return blocks (count, length) of a source, or of texts that are tokens already."""
    if isinstance(text, Documents):
        rng = random.Random(f"{seed} {text.name}")
        found = _training_tokens(text, tokenizer, rng, length)
        blocks = collect(found, count * length).view(count, length)
    else:
        rng, own = random.Random(f"{seed} {SELF}"), written_blocks(count)
        blocks = collect(_over_and_over(text, rng, length), own * length).view(own, length)
        blocks = with_repeats(blocks, count - own, rng)
    return blocks[rng.sample(range(count), count)]


def written_blocks(count: int) -> int:
    """Return how many of a number of blocks of `self` the model writes; the others are repeats."""
    return count - count // REPEATS


def with_repeats(blocks_NT: Tensor, count: int, rng: random.Random) -> Tensor:
    """Return blocks followed by blocks of their shuffled tokens, each sequence twice.

    Only the context tells how the second half goes on, so a model fitted to it keeps the units that
    copy.

    Args:
        blocks_NT: the blocks.
        count: how many come behind them.
        rng: draws their tokens.
    """
    length, all_M = blocks_NT.shape[1], blocks_NT.flatten()
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    if not count:  # nor may there be tokens to draw from
        return blocks_NT
    drawn_RT = torch.randint(len(all_M), (count, -(-length // 2)), generator=generator)
    return torch.cat([blocks_NT, all_M[drawn_RT].repeat(1, 2)[:, :length]])


def _over_and_over(
    written: Sequence[list[int]], rng: random.Random, length: int
) -> Iterator[list[int]]:
    """Yield what the model has written, in an order drawn for each pass."""
    if (seen := sum(map(len, written))) < length:
        raise too_short(f"{SELF} (what the model has written)", seen, length)
    while True:
        yield from rng.sample(written, len(written))


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
        for tokens in tokens_of(shuffled(texts, rng, _SHUFFLE_CHARS, len), tokenizer):
            seen += len(tokens)
            yield tokens
        if seen < length:
            raise too_short(f"{source.name} (its training part)", seen, length)
