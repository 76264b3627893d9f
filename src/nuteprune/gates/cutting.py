"""What copying from context loses without a unit of attention: measured, by cutting it.

Few-shot prompts, summaries and retrieval live on copying. A few heads carry it, and blocks of prose
hardly exercise them. Where the model copies it is sure, so gradients are near zero: to every local
score these heads look cheap. So each unit is cut alone, and random tokens that repeat tell.
Source: induction heads, Olsson et al. 2022 (arXiv 2209.11895).

Shape suffixes: S sequences, T tokens, B units that are cut at a time, V vocabulary, N units of one
kind in the whole model.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nuteprune.gates.masks import Masks
from nuteprune.gates.probe import Probe, Scores

SEQUENCES, LENGTH = 3, 100
"""Sequences, and the tokens of each that come once more. 300 tokens tell the groups apart."""
COPIES = 0.1
"""Share of the repeat's tokens that a model gets right if it copies at all."""
AT_ONCE = 4
"""Units that are cut at a time, each in a sequence of its own."""
LOWEST_ID = 1 / 50
"""Share of the vocabulary that is left out at its beginning: bytes and special tokens."""


def copying_kept(probe: Probe, scores: Scores) -> Scores:
    """Raise the scores of attention units that copying hangs on; nothing if it does not copy.

    score = max(score, median(score) x loss / median(loss)), with the loss of `copying_losses`: the
    worse of both on one scale, since a mean would hide a switch.
    """
    kinds = [kind for kind in ("heads", "kv_groups") if kind in scores]
    layers = len(probe.anatomy.layers)
    copies, dense_STV, ids_ST = _dense(probe)
    raised = dict(scores)
    for kind in kinds:
        if copies < COPIES:
            for _ in range(layers):
                probe.progress()
            continue
        losses_N = copying_losses(probe, kind, dense_STV, ids_ST)
        relative_N = losses_N / losses_N.median().clamp(min=1e-12)
        raised[kind] = torch.maximum(scores[kind], scores[kind].median() * relative_N)
    return raised


def repeated(vocabulary: int, length: int, seed: int) -> Tensor:
    """Return random token ids (S, 2 x length), each sequence followed by itself."""
    generator = torch.Generator().manual_seed(seed)
    lowest = int(vocabulary * LOWEST_ID)
    ids_ST = torch.randint(lowest, vocabulary, (SEQUENCES, length), generator=generator)
    return torch.cat([ids_ST, ids_ST], dim=1)


@torch.no_grad()
def _dense(probe: Probe) -> tuple[float, Tensor, Tensor]:
    """Return the share that the dense model copies, its log-probabilities (S, T, V), the ids."""
    model = probe.anatomy.model
    vocabulary, device = probe.anatomy.embedding.weight.shape[0], next(model.parameters()).device
    positions = getattr(model.config, "max_position_embeddings", None) or 2 * LENGTH
    ids_ST = repeated(vocabulary, min(LENGTH, positions // 2), probe.seed).to(device)
    with probe.hooks.using(None):
        dense_STV = _repeats(probe, ids_ST)
    right_ST = dense_STV.argmax(-1) == ids_ST[:, ids_ST.shape[1] // 2 :]
    return float(right_ST.float().mean()), dense_STV, ids_ST


def _repeats(probe: Probe, ids_BT: Tensor) -> Tensor:
    """Return log-probabilities (B, T, V) of the repeat's tokens."""
    length = ids_BT.shape[1] // 2
    model = probe.anatomy.model
    # The last token of the first time predicts the first one of the repeat.
    logits = model(input_ids=ids_BT, use_cache=False, logits_to_keep=length + 1).logits
    return cast(Tensor, logits[:, :-1].float().log_softmax(-1))


@torch.no_grad()
def copying_losses(probe: Probe, kind: str, dense_STV: Tensor, ids_ST: Tensor) -> Tensor:
    """Return the KL divergence (N,) from the dense model when each unit is cut alone.

    Args:
        probe: the model; `progress` is told of each layer.
        kind: `heads` or `kv_groups`.
        dense_STV: the dense model's log-probabilities of the repeats.
        ids_ST: the sequences, each followed by itself.

    Returns:
        The mean over the repeats' tokens, in nats, on the CPU.
    """
    layout, count = probe.layout, probe.layout.units(kind)
    losses_N, first = torch.zeros(count), 0
    for size in layout.sizes[kind]:
        for units in torch.arange(first, first + size).split(AT_ONCE):
            values_BN = torch.ones(len(units), count, device=ids_ST.device)
            values_BN[torch.arange(len(units)), units] = 0
            with probe.hooks.using(Masks(layout, {kind: values_BN})):
                for ids_T, dense_TV in zip(ids_ST, dense_STV, strict=True):
                    cut_BTV = _repeats(probe, ids_T.expand(len(units), -1))
                    nats_BTV = dense_TV.exp() * (dense_TV - cut_BTV)
                    losses_N[units] += nats_BTV.sum(-1).mean(-1).cpu() / len(ids_ST)
        first += size
        probe.progress()
    return losses_N
