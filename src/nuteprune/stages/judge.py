"""Judge: perplexity on held-out text, copying from context; answers are judged beside the dense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.console import Progress, silent
from nuteprune.data.blocks import JUDGED
from nuteprune.errors import RunFailed, UserError
from nuteprune.judge.copying import Copying, copying
from nuteprune.judge.perplexity import perplexities, protocol

Figures = dict[str, Any]
"""`perplexity` {source: value}, `copying` {percent, protocol} or None; fit for JSON."""


def copies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **how: int
) -> Copying | None:
    """Return how a model copies; None where it has too few ids or positions to tell.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        **how: `seed` and `batch_size`, as `copying` takes them.
    """
    try:
        return copying(model, tokenizer, **how)
    except UserError:
        return None


def judge(
    model: PreTrainedModel,
    held_out: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "the model",
    progress: Progress = silent,
) -> Figures:
    """Judge a model: perplexity, and copying where it can be measured.

    Args:
        model: a causal LM.
        held_out: text to judge by, source -> token ids (N, T).
        tokenizer: its tokenizer.
        name: what messages call the model.
        progress: told of the beginning and the end.

    Raises:
        RunFailed: if its perplexity is no finite number.
    """
    title = f"judge {name}"
    progress(title, 0, 1)
    found = perplexities(model, held_out, batch_size=JUDGED)
    if not all(map(math.isfinite, found.values())):
        raise RunFailed(
            f"the perplexity of {name} is not finite ({found}); use --dtype float32 or a lower rate"
        )
    copied = copies(model, tokenizer)
    about = {"percent": copied.percent, "protocol": copied.protocol} if copied else None
    progress(title, 1, 1)
    return {"perplexity": found, "copying": about}


def entries(held_out: Mapping[str, Tensor], before: Figures, after: Figures) -> dict[str, Any]:
    """Return what a record says of a model beside the dense one, by their figures."""
    ppl = {"before": before["perplexity"], "after": after["perplexity"]}
    found: dict[str, Any] = {"perplexity": {**ppl, "protocol": protocol(held_out)}}
    if before["copying"] and after["copying"]:
        found["copying"] = {
            "before": before["copying"]["percent"],
            "after": after["copying"]["percent"],
            "protocol": before["copying"]["protocol"],
        }
    return found
