"""The text of a run: what it trains on, what the model writes itself, and what calibrates.

Shape suffixes: N blocks, T tokens of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nuteprune.data.blocks import (
    BlockDataset,
    HeldOut,
    collated,
    held_out_blocks,
    training_blocks,
    written_blocks,
)
from nuteprune.errors import UserError

GUARD = 0.5
"""Share of the text that the model writes itself, by default. Calibrated on one kind of text alone,
a model keeps that and forgets the rest; see docs/quality.md."""
ONCE = 1600
"""Blocks of training up to which the model writes all of its share: 400 steps of 4."""
READINGS = 4
"""How often longer training reads self-written text at most."""
FIRST = 32
"""Items of the text that are looked at before a run."""


def tokens_to_write(blocks: int, calibrated: int, share: float, length: int) -> int:
    """Return how many tokens a model writes itself.

    Args:
        blocks: how many the run reads.
        calibrated: how many of these it reads before the first step.
        share: the model's share of the run's blocks.
        length: tokens per block.
    """
    once = max(calibrated, min(blocks, ONCE))
    return written_blocks(max(1, round(share * max(once, blocks / READINGS)))) * length


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


def check_text(dataset: Any, alike: bool = False) -> None:
    """Refuse a dataset that calibration cannot read by index.

    Args:
        dataset: the text.
        alike: whether its items must have one length; the first ones are checked.

    Raises:
        UserError: naming what is missing.
    """
    if dataset is None:
        raise UserError("there is no training text: pass train_dataset")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"train_dataset is a {type(dataset).__name__}, which can only be read in order, and "
            "calibration reads its end: pass a list of its first items, such as "
            "list(itertools.islice(dataset, args.blocks))"
        )
    if not len(dataset):
        raise UserError("train_dataset is empty: pass at least one item with input_ids")
    if "input_ids" not in (item := dataset[0]):
        raise UserError(
            f"items of train_dataset have {', '.join(map(str, item))} and no input_ids: pass "
            "tokenized text"
        )
    if alike:
        collated([dataset[i] for i in range(min(FIRST, len(dataset)))])


def calibration_blocks(dataset: Any, count: int) -> Tensor:
    """Return token ids (N, T) of blocks from the end of the training text, the last one first.

    Padding is left out, and the tokens after it move up.

    Args:
        dataset: items with `input_ids` (T,) and, where there is padding, `attention_mask` (T,);
            blocks are as long as the longest of the last `count`.
        count: blocks wanted; a short dataset gives some of them twice.

    Raises:
        UserError: if there is no text, or nothing but padding.
    """
    check_text(dataset)
    size = len(dataset)
    order = range(size - 1, -1, -1)
    length = max((len(dataset[i]["input_ids"]) for i in order[:count]), default=0)
    parts: list[Tensor] = []
    missing, read = count * length, 0
    while missing > 0:
        if read == size and not any(map(len, parts)):
            raise UserError("the training text is nothing but padding: check its attention_mask")
        item = dataset[order[read % size]]
        ids = torch.as_tensor(item["input_ids"])
        if "attention_mask" in item:
            ids = ids[torch.as_tensor(item["attention_mask"]).bool()]
        parts.append(ids)
        missing, read = missing - len(ids), read + 1
    if not count:
        return torch.empty(0, length, dtype=torch.long)
    return torch.cat(parts)[: count * length].view(count, length)
