"""Save: the smaller model as a checkpoint that others load, with its record and its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from nuteprune.export.checkpoint import as_stored
from nuteprune.export.record import write_pruned
from nuteprune.gates.budget import Budget
from nuteprune.stages.slice import Sliced

if TYPE_CHECKING:
    from nuteprune.export.wrapping import Around


def save(
    sliced: Sliced,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    budget: Budget,
    parameters: Mapping[str, int],
    stored_dtype: torch.dtype,
    around: Around | None = None,
    **record: Any,
) -> dict[str, Any]:
    """Write a smaller model; its counts are those of the written files.

    Args:
        sliced: the model, which takes the dtype that it is stored in.
        folder: absent, empty, or with nothing but `run/` in it.
        tokenizer: the model's.
        budget: what the dense model's parameters were counted by.
        parameters: `before`, those of the dense model, and what a token goes through.
        stored_dtype: dtype of the file.
        around: the other parts of the source checkpoint; None: there are none.
        **record: further keys of the record.

    Returns:
        The record as it was written.

    Raises:
        UserError: if the folder holds other files.
    """
    record.setdefault("perplexity", {"before": {}, "after": {}})
    return write_pruned(
        folder,
        as_stored(sliced.model, stored_dtype),
        tokenizer,
        around=around,
        params={"blocks_before": budget.before, **parameters},
        before=budget.shape,
        after=sliced.shape,
        **record,
    )
