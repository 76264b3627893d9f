"""How well a model predicts text: perplexity, and bits per character whatever the tokenizer.

Shape suffixes: N blocks, B blocks of a batch, T tokens of a block, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data.tokens import bos_of, end_of
from nuteprune.distill.losses import IGNORED
from nuteprune.model.forwards import evaluating, last_logits
from nuteprune.processes import ALONE, Team
from nuteprune.simulated import number

_MEASURE = "exp of the mean next-token negative log-likelihood (float32), "
# How the numbers are made, for the record; `protocol` adds what differs from run to run.
PROTOCOL: Final[Mapping[str, str]] = {
    "measure": f"{_MEASURE}all tokens of a block but the first predicted",
    "text": "held-out documents of each source, never trained on, in the source's order",
    "joining": "tokenized without special tokens, joined by eos (else bos, else nothing), cut into "
    "full blocks without overlap or padding, each after bos where the tokenizer puts it first",
    "mean": "plain mean over the sources",
}
OVERLAPPING: Final = f"{_MEASURE}each token but the first predicted once, by the block it is new in"
"""The measure where blocks overlap."""

_POSITIONS = 1024  # so many rows of logits are held in float32 at a time


def perplexity(
    model: nn.Module,
    blocks: Tensor,
    *,
    batch_size: int = 8,
    context: Tensor | None = None,
    team: Team = ALONE,
) -> float:
    """Measure how well a causal language model predicts blocks of tokens.

    Args:
        model: takes `input_ids` (B, T) and `use_cache`, and returns `logits` (B, T, V); it is put
            into evaluation mode meanwhile, and computes where its parameters are.
        blocks: token ids (N, T), N >= 1 and T >= 2.
        batch_size: blocks per forward pass; makes no difference but to memory and time.
        context: how many of each block's first tokens (N,) are only read, at least 1 and less than
            T; None: 1, since the first token has nothing that it could be predicted from.
        team: processes that read the blocks together.

    Returns:
        exp of the mean negative log-likelihood of the predicted tokens, N·(T-1) of them without
        `context`, in nats.
    """
    device = next(model.parameters()).device
    count, length = blocks.shape
    if context is None:
        context = torch.ones(count, dtype=torch.long)
    is_read_NT = torch.arange(length) < context[:, None]
    targets = blocks.masked_fill(is_read_NT, IGNORED)

    def read(rows: slice) -> Tensor:
        parts = (x[rows].split(batch_size) for x in (blocks, targets))
        found = (
            _negative_log_likelihoods(model, x.to(device), y) for x, y in zip(*parts, strict=True)
        )
        return torch.tensor([nats for batch in found for nats in batch], dtype=torch.float64)

    with torch.no_grad(), evaluating(model):
        total = float(team.by_rows(count, read).sum())
    predicted = int((~is_read_NT).sum())
    # Unlike math.exp, a tensor's goes to infinity where a broken model takes it.
    return torch.tensor(total / predicted, dtype=torch.float64).exp().item()


def perplexities(
    model: nn.Module, sources: Mapping[str, Tensor], *, batch_size: int = 8, team: Team = ALONE
) -> dict[str, float]:
    """Measure the perplexity on each source.

    Args:
        model: as `perplexity` takes it.
        sources: source name -> token ids (N, T).
        batch_size: blocks per forward pass.
        team: processes that read the blocks together.

    Returns:
        Source name -> perplexity, in the order of `sources`.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "team": team}
    return {name: perplexity(model, blocks, **how) for name, blocks in sources.items()}


def mean(perplexities: Mapping[str, float]) -> float:
    """Return the plain mean over the sources, of which there is at least one."""
    return statistics.fmean(perplexities.values())


def protocol(sources: Mapping[str, Tensor]) -> dict[str, object]:
    """Describe how `perplexities` judges by these blocks.

    Args:
        sources: source name -> token ids (N, T).

    Returns:
        `PROTOCOL` with the length T, the count N and a hash of each source's blocks; fit for JSON.
    """
    return {
        **PROTOCOL,
        "block_length": {name: blocks.shape[1] for name, blocks in sources.items()},
        "block_count": {name: blocks.shape[0] for name, blocks in sources.items()},
        "block_hash": {name: _hash(blocks) for name, blocks in sources.items()},
    }


def _hash(blocks_NT: Tensor) -> str:
    """Return what tells blocks from others of the same name and size."""
    ids = blocks_NT.to("cpu", torch.int64).contiguous().numpy()
    return hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest()


def _negative_log_likelihoods(
    model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor
) -> list[float]:
    """Return the sum over each block's predicted tokens, a few positions in float32 at a time."""
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    targets_BT = targets_BT.to(logits_BTV.device)
    return [
        sum(
            number(F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum"))
            for logits, targets in zip(
                logits_TV.split(_POSITIONS), targets_T.split(_POSITIONS), strict=True
            )
        )
        for logits_TV, targets_T in zip(logits_BTV[:, :-1], targets_BT[:, 1:], strict=True)
    ]


@torch.inference_mode()
def bits_per_character(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> float:
    """Return the negative log-likelihood of texts in bits, over their characters.

    Args:
        model: a causal LM; it computes where its parameters are, in evaluation mode.
        tokenizer: its tokenizer.
        texts: each is read by itself, after what the tokenizer begins texts with, or after
            end-of-text, or from its second token on; at least one is not empty.
    """
    start, nats = bos_of(tokenizer) or end_of(tokenizer), 0.0
    with evaluating(model):
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            ids_1T = torch.tensor([[*start, *ids]], device=model.device)
            targets_T = ids_1T[0, max(1, len(start)) :]  # nothing says what the first token is
            logits_TV = last_logits(model, ids_1T, len(targets_T) + 1)[0, :-1].float()
            nats += float(F.cross_entropy(logits_TV, targets_T, reduction="sum"))
    return nats / math.log(2) / sum(map(len, texts))
