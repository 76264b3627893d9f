"""What a pruned model loses on tokens that need their context, and on the others.

Most tokens of a text follow from the few before them. The others, names above all, show whether a
model still reads distant text; a mean over all tokens hides them.

Shape suffixes: N blocks, B of a batch, T tokens of a block, S scored tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from nuteprune.data.tokens import after
from nuteprune.model.forwards import evaluating, last_logits

SCORED: Final = 128
"""Tokens of a block that are judged, the last ones."""
TOGETHER: Final = 8
"""Tokens that share a window of short context, so that it costs 3 tokens each in place of 17."""
NEEDS: Final = 2.0
"""Nats that a token's log-probability has to rise for it to need its context."""


class Span(NamedTuple):
    """Lengths of the long and the short context that are compared.

    `far`: tokens before a block's scored ones; `near`: tokens of the short context, at least.
    """

    far: int
    near: int

    @property
    def length(self) -> int:
        """Tokens of a block."""
        return self.far + SCORED


SPANS: Final = (Span(128, 16), Span(1024, 128))

_MEASURES: Final = {
    "needing": "tokens whose log-probability under the dense model is more than {needs:g} nats "
    "higher given the {far} to {most} tokens before them than given the last {near} to {nearly} "
    "({together} tokens share a window)",
    "lost": "dense minus pruned model's log-probability of these tokens, both with all of the "
    "context, mean in nats",
    "lost_elsewhere": "the same on the other tokens",
    "gain": "what the context adds to the log-probability of the tokens that need it, each model "
    "by itself, mean in nats",
    "kept": "the pruned model's gain in percent of the dense model's",
}


def judge_context(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    blocks_NT: Tensor,
    span: Span,
    bos: Sequence[int] = (),
    batch_size: int = 4,
) -> dict[str, Any]:
    """Measure what a pruned model loses on tokens that need their context.

    Args:
        dense: the dense model.
        pruned: the pruned one; both compute where their parameters are.
        blocks_NT: token ids, T = `span.length`, each after `bos` if there is one.
        span: how much context is asked about.
        bos: what comes before every text.
        batch_size: blocks per forward pass.

    Returns:
        `tokens`, `needing` (counts), `lost`, `lost_elsewhere`, `gain` {`before`, `after`}, `kept`,
        and `protocol`; None where no token is of that kind. See `protocol.measures`.
    """
    windows_NT = windows(blocks_NT, span.near, bos)
    together = max(1, batch_size * span.length // windows_NT.shape[1])
    dense_NS, pruned_NS = (likelihoods(x, blocks_NT, SCORED, batch_size) for x in (dense, pruned))
    short_NS = likelihoods(dense, windows_NT, TOGETHER, together).view_as(dense_NS)
    needs_NS, lost_NS = dense_NS - short_NS > NEEDS, dense_NS - pruned_NS
    # Of the pruned model's windows only those count that hold such a token.
    needs_NT = needs_NS.view(len(windows_NT), TOGETHER)
    met_N = needs_NT.any(1)
    own_NT = likelihoods(pruned, windows_NT[met_N], TOGETHER, together)
    before = _mean((dense_NS - short_NS)[needs_NS])
    gained = _mean(pruned_NS[needs_NS] - own_NT[needs_NT[met_N]])
    return {
        "tokens": needs_NS.numel(),
        "needing": int(needs_NS.sum()),
        "lost": _mean(lost_NS[needs_NS]),
        "lost_elsewhere": _mean(lost_NS[~needs_NS]),
        "gain": {"before": before, "after": gained},
        "kept": None if before is None or gained is None else 100 * gained / before,
        "protocol": {"measures": _measures(span), "blocks": len(blocks_NT)},
    }


def _measures(span: Span) -> dict[str, str]:
    seen = {"far": span.far, "most": span.length - 1, "near": span.near}
    seen |= {"nearly": span.near + TOGETHER - 1, "together": TOGETHER}
    return {name: text.format(needs=NEEDS, **seen) for name, text in _MEASURES.items()}


def cut_blocks(text: Sequence[Tensor], span: Span, bos: Sequence[int] = (), *, most: int) -> Tensor:
    """Return the beginnings (N, T) of blocks that are long enough, evenly from all sources.

    Args:
        text: token ids (N, T) of each source, T as it comes.
        span: tells how long a block is.
        bos: what comes before every text; added to blocks without it.
        most: blocks in all.
    """
    made = []
    for blocks_NT in text:
        own = list(bos) if blocks_NT[0, : len(bos)].tolist() != list(bos) else []
        cut_NT = after(own, blocks_NT.cpu())[:, : span.length]
        if cut_NT.shape[1] == span.length:
            made.append(cut_NT)
    each = most // max(len(made), 1)
    return torch.cat([x[:each] for x in made]) if made else torch.empty(0, span.length).long()


def windows(blocks_NT: Tensor, near: int, bos: Sequence[int] = ()) -> Tensor:
    """Return windows of short context over the scored tokens of blocks, in their order.

    Args:
        blocks_NT: token ids, T >= near + SCORED.
        near: tokens that come before the first scored one of a window.
        bos: what comes before every text.

    Returns:
        Token ids (N · SCORED / TOGETHER, len(bos) + near + TOGETHER), of which the last `TOGETHER`
        are scored.
    """
    last_NT = blocks_NT[:, -(SCORED + near) :]
    return after(bos, last_NT.unfold(1, near + TOGETHER, TOGETHER).flatten(0, 1))


@torch.inference_mode()
def likelihoods(model: PreTrainedModel, blocks_NT: Tensor, count: int, batch_size: int) -> Tensor:
    """Return the log-probabilities (N, count), in float32, of each block's last tokens."""
    found = [torch.empty(0, count)]
    with evaluating(model):
        for ids_BT in blocks_NT.split(batch_size) if len(blocks_NT) else ():
            logits_BSV = last_logits(model, ids_BT.to(model.device), count + 1)[:, :-1]
            targets_BS = ids_BT[:, -count:].to(logits_BSV.device)
            losses_BS = F.cross_entropy(logits_BSV.float().mT, targets_BS, reduction="none")
            found.append(-losses_BS.cpu())
    return torch.cat(found)


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None
