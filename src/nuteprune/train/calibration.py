"""Text and manners for what is measured outside of training: scores and re-fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Progress = Callable[[str, int, int], None]
"""Told (what is being done, units done, units in all) during long work outside of training."""


def calibration_batches(dataset: Any, count: int, batch_size: int) -> list[Tensor]:
    """Return token ids (B, T) of `count` blocks from the end of the training text.

    The end is what training itself comes to last, if at all.

    Args:
        dataset: items with `input_ids` (T,) of equal length.
        count: blocks wanted; a short dataset gives some of them twice.
        batch_size: blocks per batch.
    """
    size = len(dataset)
    picks = [size - 1 - i % size for i in range(count)]
    ids = torch.stack([torch.as_tensor(dataset[i]["input_ids"]) for i in picks])
    return list(ids.split(batch_size))


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Take gradients of activations alone for a while."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def counted(progress: Progress, what: str, total: int) -> Callable[[], None]:
    """Return a function that tells `progress` of one more unit done each time it is called."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    progress(what, 0, total)
    return tick
