"""Calibration text: blocks from the end of the training text, which the stages read.

Shape suffixes: N blocks, T tokens of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nuteprune.data.blocks import collated
from nuteprune.errors import UserError

FIRST = 32
"""Items of the text that are looked at before a run."""


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
