"""Measures copying from context: does a model repeat a random sequence of tokens?

Few-shot prompts, summaries, retrieval and code live on it, and prose hardly shows whether a model
still can. The sequence is random, so only the context tells how its repeat goes on.

Shape suffixes: N sequences, B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data.tokens import bos_of
from nuteprune.errors import UserError
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.forwards import evaluating, last_logits

SEQUENCES: Final = 32
LENGTH: Final = 100
SEED: Final = 1618
"""Draws the tokens where figures are reported. To choose models by this measure, pass a seed from 0
to 9: the default seed's sequences then judge the choice."""

MEASURE: Final = (
    "random token sequences, each followed by itself: share of the repeat's tokens, in percent, "
    "that the model holds for the likeliest given all tokens before"
)

# Of a vocabulary's ids, those in between: 1,000 to 40,000 of 49,152. The first ids are mostly
# bytes and special tokens, the last ones are rare, and were hardly trained on.
_FROM, _TO, _OF = 1000, 40000, 49152


@dataclass(frozen=True)
class Copying:
    """How well a model copies.

    Args:
        percent: share of the repeat's tokens that are the likeliest.
        tokens: how many tokens were to be copied.
        protocol: how it was measured, fit for JSON.
    """

    percent: float
    tokens: int
    protocol: dict[str, Any]


def copying(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = SEED,
    batch_size: int = 4,
) -> Copying:
    """Measure how well a model copies a random sequence from its context.

    Args:
        model: a causal LM; it computes where its parameters are, in evaluation mode.
        tokenizer: its tokenizer: tells ordinary ids from special ones, and whether texts begin
            with bos.
        seed: draws the tokens; the same tokenizer and seed give the same sequences.
        batch_size: sequences per forward pass.

    Raises:
        UserError: if the vocabulary has no ordinary ids, or the model too few positions.
    """
    ids = ordinary_ids(tokenizer, Anatomy(model).embedding.weight.shape[0])
    bos = bos_of(tokenizer)
    length = _length(model, len(bos))
    drawn_NT = draw(ids, length, seed)
    right = _count(model, drawn_NT, bos, batch_size)
    tokens = drawn_NT.numel()
    protocol = {
        "measure": MEASURE,
        "sequences": SEQUENCES,
        "length": length,
        "tokens": tokens,
        "lowest_id": int(ids.min()),
        "highest_id": int(ids.max()),
        "bos": bool(bos),
        "seed": seed,
    }
    return Copying(100 * right / tokens, tokens, protocol)


def ordinary_ids(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """Return the ids (n,) to draw from: the middle of a vocabulary, without special tokens.

    Args:
        tokenizer: knows its special and its added tokens.
        vocabulary: the model's number of ids; it may be above the tokenizer's, or below.

    Raises:
        UserError: if none are left.
    """
    size = min(len(tokenizer), vocabulary)
    # Added tokens are no pieces of text: roles of a chat, markers, places kept free.
    apart = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    kept = [x for x in range(size * _FROM // _OF, size * _TO // _OF) if x not in apart]
    if not kept:
        raise UserError(
            f"copying cannot be measured: of the {size} ids that tokenizer and model share, none "
            "in the middle is an ordinary token; pass the tokenizer that belongs to the model"
        )
    return torch.tensor(kept)


def draw(ids_n: Tensor, length: int, seed: int) -> Tensor:
    """Return random sequences (N, T) of ids (n,)."""
    random = torch.Generator().manual_seed(seed)
    return ids_n[torch.randint(len(ids_n), (SEQUENCES, length), generator=random)]


def _length(model: PreTrainedModel, first: int) -> int:
    """Return the length of the sequence; shorter if the model has too few positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    length = LENGTH if positions is None else min(LENGTH, (positions - first) // 2)
    if length < 1:
        raise UserError(
            f"copying cannot be measured: the model knows {positions} positions, too few for a "
            "token and its repeat"
        )
    return length


@torch.inference_mode()
def _count(model: PreTrainedModel, drawn_NT: Tensor, bos: list[int], batch_size: int) -> int:
    """Count the tokens of the repeats that are the likeliest."""
    right, length = 0, drawn_NT.shape[1]
    with evaluating(model):
        for drawn_BT in drawn_NT.to(model.device).split(batch_size):
            first = drawn_BT.new_tensor(bos).expand(len(drawn_BT), len(bos))
            ids_BT = torch.cat([first, drawn_BT, drawn_BT], dim=1)
            # The last token of the first time predicts the first one of the repeat.
            likeliest_BT = last_logits(model, ids_BT, length + 1)[:, :-1].argmax(-1)
            right += int((likeliest_BT == drawn_BT.to(likeliest_BT.device)).sum())
    return right
