"""How a model writes: a batch of texts, one token of each at a time.

All texts of a batch take one token at a time from the first position on, be it given or drawn, so
that none is padded. A text's draws depend on its place alone, not on what the others write.

Shape suffixes: B texts of a batch, V token ids.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nuteprune.data.tokens import Openings
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.forwards import cache_name, evaluating, heads_as_tokens
from nuteprune.processes import ALONE, Team, agree, sum_dtype

TEXT_TOKENS = 64
"""Tokens of a plain text at most: many short texts show more of what a model knows than few long
ones; see docs/log.md."""
BATCH = 64
"""Texts that are written together; of short ones more, see `plain_together`."""
SPARE = 1.1
"""As many times the texts are begun that would do if none ended early: else one that lacks a few
tokens writes as much again."""
_CACHE_BYTES = 2**32  # most memory for keys and values; models with many get smaller batches
_DRAWN = 2**19  # numbers that a draw sums up at a time, so that they stay in a processor's cache

TIMED = 4
"""Positions that an estimate of time is taken from; the first ones warm up."""


class TextInProgress:
    """A text that is being written: which of its tokens are given, and when it ends.

    Args:
        opening: how texts begin.
        number: which plain text it is; None: a chat.
    """

    def __init__(self, opening: Openings, number: int | None) -> None:
        self.opening = opening
        self.asks = number is None
        self.given = deque(opening.asks if number is None else opening.given(number))
        self.ids: list[int] = []
        self.ended = False

    def next_token(self, drawn: int) -> int:
        """Go on by a token: the next given one, or else one that the model draws."""
        answers = self.opening.answers
        if self.ended:
            return self.ids[-1]
        if self.asks and not self.given and drawn in self.opening.asked:
            self.asks = False
            self.given.extend(answers)
        if self.given:
            self.ids.append(self.given.popleft())
            return self.ids[-1]
        self.ids.append(drawn)
        if self.asks and tuple(self.ids[-len(answers) :]) == answers:
            self.asks = False  # some models go on to the answer by themselves
        self.ended = drawn in self.opening.ends
        return drawn


class BatchSizes(NamedTuple):
    """How many texts a batch has, and how many tokens each at most: plain ones, and chats."""

    plain: int
    plain_tokens: int
    chats: int
    chat_tokens: int

    @classmethod
    def of(cls, opening: Openings, tokens: int, most: int, together: int) -> BatchSizes:
        """Return the sizes for a number of tokens.

        Args:
            opening: how texts begin.
            tokens: how many are asked for.
            most: tokens that a block leaves for a text.
            together: texts that are written together at most.
        """
        short, of_chats = min(most, TEXT_TOKENS), opening.chats * tokens
        plain = math.ceil(SPARE * (tokens - of_chats) / (short + 1))
        chats = math.ceil(of_chats / (most + 1))
        alike = math.ceil(chats / together)  # batches of chats, none of them larger than others
        return cls(
            plain_together(plain, together, most), short, math.ceil(chats / max(alike, 1)), most
        )


def next_batch(
    opening: Openings, sizes: BatchSizes, written: Sequence[int]
) -> tuple[list[TextInProgress], int]:
    """Return the texts of the next batch, and how many tokens each has at most.

    It has chats where that brings chats nearer to their share of the tokens.

    Args:
        opening: how texts begin.
        sizes: of the batches.
        written: how many tokens each batch before it has.
    """
    begun = plain = chats = 0

    def chats_are_due() -> bool:
        more = sizes.chats * sizes.chat_tokens
        return opening.chats * (plain + chats + more) - chats > more / 2

    for tokens in written:
        if chats_are_due():
            chats += tokens
        else:
            plain += tokens
            begun += sizes.plain
    if chats_are_due():
        return [TextInProgress(opening, None) for _ in range(sizes.chats)], sizes.chat_tokens
    return [TextInProgress(opening, begun + i) for i in range(sizes.plain)], sizes.plain_tokens


WriteBatch = Callable[
    [Openings, Sequence[TextInProgress], int, torch.Generator, Team], Iterator[int]
]
"""Writes a batch; see `write_batch`, which does it with the model itself."""


def write_batch(
    model: PreTrainedModel,
    opening: Openings,
    batch: Sequence[TextInProgress],
    most: int,
    generator: torch.Generator,
    team: Team = ALONE,
) -> Iterator[int]:
    """Write a batch of texts; yields the number of tokens so far, position by position.

    All processes of a run call it: in each the texts are the main one's.

    Args:
        model: the model.
        opening: how texts begin, and what ends them.
        batch: the texts, with nothing written yet.
        most: tokens that a text has at most.
        generator: draws the numbers (B,) by which tokens are drawn.
        team: processes that share the texts out.
    """
    total = len(opening.start) + most
    cache: dict[str, Any] = {}
    drawn_B = torch.zeros(len(batch), dtype=torch.long)

    def drawn(rows: slice) -> Tensor:
        nonlocal cache
        logits_BV, cache = _step(model, next_B[rows], cache)
        return draw(logits_BV[:, : opening.known], numbers_B[rows]).cpu()

    for position in range(total):
        if position < len(opening.start):
            next_B = [opening.start[position]] * len(batch)
        else:
            next_B = [x.next_token(i) for x, i in zip(batch, drawn_B.tolist(), strict=True)]
        yield sum(len(x.ids) for x in batch)
        if position == total - 1 or all(x.ended for x in batch):
            return
        numbers_B = torch.rand(len(batch), generator=generator, dtype=torch.float64)
        drawn_B = team.by_rows(len(batch), drawn)
        agree([drawn_B])


@torch.no_grad()
def _step(
    model: PreTrainedModel, next_B: list[int], cache: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    ids_B1 = torch.tensor(next_B, device=model.device)[:, None]
    with evaluating(model), heads_as_tokens():
        made: Any = model(input_ids=ids_B1, use_cache=True, **cache)
    name = cache_name(made)
    return made.logits[:, -1], {name: made[name]}


def draw(logits_BV: Tensor, numbers_B: Tensor) -> Tensor:
    """Draw token ids (B,) at temperature 1: where each number falls in the summed probabilities.

    Args:
        logits_BV: the model's logits.
        numbers_B: evenly distributed in [0, 1).
    """
    if torch.are_deterministic_algorithms_enabled() and logits_BV.is_cuda:
        logits_BV = logits_BV.cpu()  # CUDA has no running sum in a fixed order
    rows = max(1, _DRAWN // logits_BV.shape[1] if logits_BV.is_cpu else len(logits_BV))
    batches = zip(logits_BV.split(rows), numbers_B.split(rows), strict=True)
    return torch.cat([_draw(*batch) for batch in batches])


def _draw(logits_BV: Tensor, numbers_B: Tensor) -> Tensor:
    dtype = sum_dtype(logits_BV.device)
    sums_BV = logits_BV.to(dtype).softmax(-1).cumsum(-1)
    sought_B = numbers_B.to(logits_BV.device, dtype) * sums_BV[:, -1]
    found_B1 = torch.searchsorted(sums_BV, sought_B[:, None], right=True)
    return found_B1[:, 0].clamp(max=logits_BV.shape[1] - 1)


def seconds_per_token(model: PreTrainedModel, size: int) -> float:
    """Return about how long a batch of texts takes for a token of each, timed on the first ones.

    Later positions are assumed to cost no more.
    """
    cache: dict[str, Any] = {}
    seconds = []
    for _ in range(TIMED):
        started = time.monotonic()
        logits_BV, cache = _step(model, [0] * size, cache)
        draw(logits_BV, torch.zeros(size, dtype=torch.float64)).tolist()
        seconds.append(time.monotonic() - started)
    return min(seconds)


def most_cached(model: PreTrainedModel, length: int) -> int:
    """Return the bytes of keys and values that are held while a model writes blocks of a length."""
    return fitting(model, length) * _cached(model, length)


def fitting(model: PreTrainedModel, length: int) -> int:
    """Return how many texts are written together, by the size of their keys and values."""
    return max(1, min(BATCH, _CACHE_BYTES // max(_cached(model, length), 1)))


def plain_together(texts: int, together: int, most: int) -> int:
    """Return how many plain texts are written together: all, if the memory of a block's holds them.

    Args:
        texts: plain texts in all.
        together: texts of a block that are written together.
        most: tokens that a block leaves for a text.
    """
    short = most >= 2 * TEXT_TOKENS
    return texts if texts <= together * (2 if short else 1) else together


def _cached(model: PreTrainedModel, length: int) -> int:
    """Return the bytes of keys and values of a text."""
    anatomy = Anatomy(model)
    heads = sum(layer.kv_heads for layer in anatomy.shape.layers)
    return round(anatomy.cached_features * length * heads * model.dtype.itemsize)
