"""A pruned model judged beside the dense one: its answers, and its use of context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.console import Output
from nuteprune.data.prompts import Prompts, make_prompts
from nuteprune.data.tokens import bos_of
from nuteprune.errors import UserError
from nuteprune.export.card import answer_rows, context_rows
from nuteprune.judge.answers import TOKENS, answer_both, entry_of, pick_samples
from nuteprune.judge.context import SPANS, cut_blocks, judge_context

BLOCKS: Final = 12
"""Blocks of text at most that the use of context is measured on, where nothing else is said."""


@dataclass(frozen=True)
class Beside:
    """Answers and context of a pruned model beside the dense one.

    Args:
        entries: the record's `answers` and `context`, where they can be measured.
        samples: the median and the worst answers, as the report reads them.
    """

    entries: dict[str, Any]
    samples: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, fit for JSON."""
        return {**self.entries, **({"samples": self.samples} if self.samples else {})}


def judge_beside(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Mapping[str, Tensor],
    *,
    prompts: Prompts | None = None,
    tokens: int = TOKENS,
    blocks: int = BLOCKS,
) -> Beside:
    """Judge a pruned model's answers and its use of context beside the dense model's.

    Args:
        dense: the dense model.
        pruned: the pruned one; both compute where their parameters are.
        tokenizer: of both.
        text: held-out blocks, source -> token ids (N, T); may be empty.
        prompts: those to answer; None: those of `make_prompts`.
        tokens: most tokens per answer.
        blocks: most blocks of text for each span of context.

    Raises:
        UserError: if prompts that were given are too long.
    """
    entries: dict[str, Any] = {}
    samples: list[dict[str, str]] = []
    try:
        asked = prompts or make_prompts(dense, tokenizer, text)
        pairs = answer_both(dense, pruned, tokenizer, asked, tokens)
        entries["answers"] = entry_of(pairs, asked.source, tokens)
        samples = pick_samples(pairs, tokenizer)
    except UserError:
        if prompts is not None:
            raise
    bos = bos_of(tokenizer)
    spans = {}
    for span in SPANS:
        blocks_NT = cut_blocks(list(text.values()), span, bos, most=blocks)
        if len(blocks_NT):
            spans[str(span.length)] = judge_context(dense, pruned, blocks_NT, span, bos)
    entries |= {"context": spans} if spans else {}
    return Beside(entries, samples)


def print_beside(
    record: Mapping[str, Any], samples: Sequence[Mapping[str, str]], output: Output
) -> None:
    """Print what a record says of answers and context, and answers side by side.

    Args:
        record: with `answers` and `context`, or one of them, or neither.
        samples: as `shown` returns them.
        output: where to.
    """
    tables = {"Answers": answer_rows(record), "Context": context_rows(record)}
    for title, rows in tables.items():
        if rows:
            output.line()
            output.table(title, ["", "dense", "pruned"], [list(row.cells) for row in rows])
    for sample in samples:
        output.line(f"The {sample['which']} answer, by repeats: {sample['prompt']}")
        for who in ("dense", "pruned"):
            output.line(f"  {who}: {' '.join(sample[who].split())}")
