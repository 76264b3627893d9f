"""Tokens of texts: how these begin, end and are joined, and how those begin that a model writes.

Shape suffixes: N blocks, T tokens of a block, B = 1, V token ids, n tokens that may come first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data.columns import render
from nuteprune.errors import UserError
from nuteprune.model.forwards import evaluating
from nuteprune.simulated import scored

END_OF_TEXT = "<|endoftext|>"
"""The token that many models saw between documents in pretraining, even if another token ends texts
now."""
CHATS = 0.25
"""Share of chats in the text that a chat model writes. The rest is plain text of all kinds, since a
model's chats have little code and few formats."""
TEMPERATURE = 1.5
"""Temperature at which first tokens are drawn. Drawn evenly from a vocabulary of many languages,
they put four texts of ten into other scripts; at 1 a few tokens begin most texts."""
_QUESTION = "Xylophone"  # a word that no template has, to find where a user's turn is


def bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that a tokenizer puts before every text, as a list; empty if it does not.

    Models that saw it before every text in training (Gemma above all) fail without it.
    """
    bos = tokenizer.bos_token_id
    starts = bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
    return [bos] if starts else []


def end_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that ends a text, eos or else bos, as a list; empty if there is neither."""
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    return [token for token in ends if token is not None][:1]


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text; no special tokens are added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def tokens_of(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the tokens of each text, ended by the token that joins it to the next, if any.

    Args:
        texts: documents; empty ones are left out.
        tokenizer: the model's tokenizer; no special tokens are added but eos (else bos) at the end.
    """
    end = end_of(tokenizer)
    for text in filter(None, texts):
        if tokens := ids_of(text, tokenizer):
            yield [*tokens, *end]


def texts_of(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[list[int]], **how: bool
) -> list[str]:
    """Return the text of each row of tokens; none where a tokenizer fails on one.

    Tokenizers in Python may fail on ids that only pad a model's vocabulary.

    Args:
        tokenizer: the tokenizer.
        rows: token ids.
        **how: what `decode` takes, such as `skip_special_tokens`.
    """
    rows = list(rows)
    try:
        return list(tokenizer.batch_decode(rows, **how))
    except Exception:
        if len(rows) < 2:
            return [""] * len(rows)
        return [text for row in rows for text in texts_of(tokenizer, [row], **how)]


def after(first: Sequence[int], blocks_NT: Tensor) -> Tensor:
    """Return blocks (N, T) with the same tokens before each of them."""
    start = torch.tensor(list(first), dtype=blocks_NT.dtype)
    start = start.expand(len(blocks_NT), len(first))
    return torch.cat([start, blocks_NT], dim=1)


def collect(documents: Iterable[list[int]], most: int) -> Tensor:
    """Join documents to the first `most` tokens (n,), n <= most; reads no further.

    Args:
        documents: token ids of each.
        most: the number of tokens wanted.
    """
    parts = [torch.empty(0, dtype=torch.int32)]
    for tokens in documents:
        parts.append(torch.tensor(tokens[:most], dtype=torch.int32))
        most -= len(parts[-1])
        if not most:
            break
    return torch.cat(parts)


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


def check_positions(length: int, config: Any, what: str = "length") -> None:
    """Refuse what is longer than a model knows positions for.

    Args:
        length: in tokens.
        config: the model's.
        what: what has this length, in the user's words.

    Raises:
        UserError: naming both.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(
            f"{what} is {length}, and the model knows {positions} positions: pass fewer"
        )


def too_short(name: str, seen: int, length: int, instead: str = "") -> UserError:
    """Return the error for a text of `seen` tokens that gives no block of `length`."""
    return UserError(
        f"{name}: {seen} tokens, and a block takes {length}; "
        f"pass {instead}more text or a shorter block length"
    )


# -- how texts begin that a model writes


@dataclass(frozen=True)
class Openings:
    """What a model is given before it writes.

    Args:
        start: tokens that come before each text, and are no part of it.
        firsts: tokens that a text may begin with, all different, in a drawn order: likelier ones
            tend to come earlier.
        asks: what comes before a user's question; empty where there is no chat template.
        answers: what comes between a question and its answer.
        ends: tokens that end a text.
        asked: tokens that end a question.
        known: token ids below this have text; the others only pad the vocabulary.
    """

    start: tuple[int, ...]
    firsts: tuple[int, ...]
    asks: tuple[int, ...]
    answers: tuple[int, ...]
    ends: frozenset[int]
    asked: frozenset[int]
    known: int

    @property
    def chats(self) -> float:
        """The share of chats: 0 for a model that does not chat."""
        return CHATS if self.asks else 0.0

    def given(self, number: int) -> tuple[int, ...]:
        """Return the tokens that plain text `number` begins with."""
        return (self.firsts[number % len(self.firsts)],)


def openings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, most: int, seed: int
) -> Openings:
    """Find how texts of a model begin and end.

    Args:
        model: the model that will write.
        tokenizer: its tokenizer.
        most: tokens per text; a chat is only begun where it leaves half of them for the model.
        seed: draws the order of the first tokens.
    """
    vocabulary: Any = model.get_input_embeddings().weight
    known = min(len(tokenizer), vocabulary.shape[0])
    given: Any = tokenizer.added_tokens_decoder
    added = given if isinstance(given, Mapping) else {}  # Mistral's own has a method there
    special = {*tokenizer.all_special_ids, *(i for i, x in added.items() if x.special)}
    # What stood between documents in pretraining, if anything did.
    between = [i for i, x in added.items() if x.content == END_OF_TEXT] or end_of(tokenizer)
    start = bos_of(tokenizer) or between
    asks, answers = chat_marks(tokenizer)
    if asks[: len(start)] == start:
        asks = asks[len(start) :]
    if len(asks) + len(answers) > most // 2 or max([*asks, *answers], default=0) >= known:
        asks = answers = []
    ends = ends_of(model, tokenizer) | set(between)
    readable = start if max(start, default=0) < known else []
    firsts = _in_drawn_order(model, readable, _firsts(tokenizer, known, special), seed)
    return Openings(
        start=tuple(start),
        firsts=tuple(firsts),
        asks=tuple(asks),
        answers=tuple(answers),
        ends=frozenset(ends),
        asked=frozenset(ends.union(answers[:1]) & (ends | special)),
        known=known,
    )


def chat_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return what a chat template puts before and after a user's question; empty for none."""
    turns = [{"role": "user", "content": _QUESTION}]
    try:
        told = render(turns, "a question", tokenizer, asks=True)
    except UserError:  # no template, or one that cannot do with a lone question
        return [], []
    before, found, after = told.partition(_QUESTION)
    if not (before and found and after):
        return [], []
    asks, answers = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (before, after))
    return list(asks), list(answers)


def _firsts(tokenizer: PreTrainedTokenizerBase, known: int, special: set[int]) -> list[int]:
    """Return the tokens that decode to text by themselves; if there are none, all tokens."""
    ordinary = [i for i in range(known) if i not in special]
    texts = texts_of(tokenizer, [[i] for i in ordinary])
    whole = [i for i, x in zip(ordinary, texts, strict=True) if x.strip() and "\ufffd" not in x]
    return whole or ordinary or list(range(known))


@torch.no_grad()
def _in_drawn_order(
    model: PreTrainedModel, start: list[int], firsts: list[int], seed: int
) -> list[int]:
    """Draw first tokens without repeats, by the model's own probabilities."""
    drawn_n = torch.rand(
        len(firsts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    keys_n = -(-drawn_n.log()).log()  # the Gumbel trick
    if start:
        with evaluating(model):
            ids_BT = torch.tensor([start], device=model.device)
            logits_V = model(input_ids=ids_BT, use_cache=False).logits[0, -1]
        keys_n += scored(logits_V.float())[torch.tensor(firsts)].double() / TEMPERATURE
    return [firsts[i] for i in keys_n.argsort(descending=True, stable=True).tolist()]


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer, by the model's settings and by its tokenizer."""
    config = getattr(model, "generation_config", None) or model.config
    named = getattr(config, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return {token for token in (*ends, *end_of(tokenizer)) if token is not None}
