"""Tokens of texts: how they begin, how they are joined, and whether a model takes them.

Shape suffixes: N blocks, T tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nuteprune.errors import UserError


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
            f"{what} is {length}, and the model knows {positions} positions; pass a shorter one"
        )


def too_short(name: str, seen: int, length: int, instead: str = "") -> UserError:
    """Return the error for a text of `seen` tokens that gives no block of `length`."""
    return UserError(
        f"{name}: {seen} tokens, and a block takes {length}; "
        f"pass {instead}more text or a shorter block length"
    )
