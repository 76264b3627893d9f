"""Judge: perplexity on held-out text, copying from context; answers are judged beside the dense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.console import Progress, silent
from nuteprune.data.prompts import Prompts, make_prompts
from nuteprune.data.tokens import bos_of
from nuteprune.data.training_text import JUDGED
from nuteprune.errors import RunFailed, UserError
from nuteprune.judge.answers import TOKENS, answer_both, entry_of, pick_samples
from nuteprune.judge.context import SPANS, copying, cut_blocks, judge_context
from nuteprune.judge.perplexity import perplexities, protocol
from nuteprune.processes import ALONE, Team

Figures = dict[str, Any]
"""`perplexity` {source: value}, `copying` {percent, protocol} or None; fit for JSON."""
BLOCKS: Final = 12
"""Blocks of text at most that the use of context is measured on, where nothing else is said."""


def judge(
    model: PreTrainedModel,
    held_out: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "the model",
    progress: Progress = silent,
    team: Team = ALONE,
) -> Figures:
    """Judge a model: perplexity, and copying where it can be measured.

    Args:
        model: a causal LM.
        held_out: text to judge by, source -> token ids (N, T).
        tokenizer: its tokenizer.
        name: what messages call the model.
        progress: told of the beginning and the end.
        team: processes that hold the model, and share the text out.

    Raises:
        RunFailed: if its perplexity is no finite number.
    """
    title = f"judge {name}"
    progress(title, 0, 1)
    found = perplexities(model, held_out, batch_size=JUDGED, team=team)
    if not all(map(math.isfinite, found.values())):
        raise RunFailed(
            f"the perplexity of {name} is not finite ({found}); use --dtype float32 or a lower rate"
        )
    copied = copying(model, tokenizer, team=team)
    progress(title, 1, 1)
    return {"perplexity": found, "copying": copied._asdict() if copied else None}


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


def judge_beside(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Mapping[str, Tensor],
    *,
    prompts: Prompts | None = None,
    tokens: int = TOKENS,
    blocks: int = BLOCKS,
    batch_size: int = 4,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Judge a pruned model's answers and its use of context beside the dense model's.

    Args:
        dense: the dense model.
        pruned: the pruned one; both compute where their parameters are.
        tokenizer: of both.
        text: held-out blocks, source -> token ids (N, T); may be empty.
        prompts: those to answer; None: those of `make_prompts`.
        tokens: most tokens per answer.
        blocks: most blocks of text for each span of context.
        batch_size: blocks of text per forward pass.
        team: processes that hold both models, and share prompts and blocks out.

    Returns:
        The record's `answers` and `context`, and the `samples` of the report; each where it can be
        had.

    Raises:
        UserError: if prompts that were given are too long.
    """
    found: dict[str, Any] = {}
    try:
        asked = prompts or make_prompts(dense, tokenizer, text, team=team)
        pairs = answer_both(dense, pruned, tokenizer, asked, tokens, team)
        found["answers"] = entry_of(pairs, asked.source, tokens)
        found["samples"] = pick_samples(pairs, tokenizer)
    except UserError:
        if prompts is not None:
            raise
    bos = bos_of(tokenizer)
    spans = {}
    for span in SPANS:
        blocks_NT = cut_blocks(list(text.values()), span, bos, most=blocks)
        if len(blocks_NT):
            spans[str(span.length)] = judge_context(
                dense, pruned, blocks_NT, span, bos, batch_size, team
            )
    return found | ({"context": spans} if spans else {})
