"""How well a model uses its context: copying from it, and tokens of a text that need it.

Few-shot prompts, summaries, retrieval and code live on copying, and prose hardly shows whether a
model still can. Random sequences do: only the context tells how the repeat of one goes on.

Most tokens of a text follow from the few before them. The others, names above all, show whether a
model still reads distant text; a mean over all tokens hides them.

Shape suffixes: N blocks or sequences, B of a batch, T tokens of one, S scored tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data.tokens import after, bos_of
from nuteprune.model.forwards import evaluating, last_logits
from nuteprune.processes import ALONE, Team

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

SCORED: Final = 128
"""Tokens of a block that are judged, the last ones."""
TOGETHER: Final = 8
"""Tokens that share a window of short context, so that it costs 3 tokens each in place of 17."""
NEEDS: Final = 2.0
"""Nats that a token's log-probability has to rise for it to need its context."""


class Copying(NamedTuple):
    """How well a model copies: `protocol` says how it was measured, fit for JSON."""

    percent: float
    """Share of the repeat's tokens that are the likeliest."""
    protocol: dict[str, Any]


@torch.no_grad()
def copying(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = SEED,
    batch_size: int = 4,
    team: Team = ALONE,
) -> Copying | None:
    """Measure how well a model copies a random sequence from its context.

    Args:
        model: a causal LM; it computes where its parameters are, in evaluation mode.
        tokenizer: its tokenizer: tells ordinary ids from special ones, and whether texts begin
            with bos.
        seed: draws the tokens; the same tokenizer and seed give the same sequences.
        batch_size: sequences per forward pass.
        team: processes that read the sequences together.

    Returns:
        What was found; None if the vocabulary has no ordinary ids, or the model too few positions.
    """
    embedding: Any = model.get_input_embeddings()
    ids_n, bos = ordinary_ids(tokenizer, len(embedding.weight)), bos_of(tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None)
    length = LENGTH if positions is None else min(LENGTH, (positions - len(bos)) // 2)
    if length < 1 or not len(ids_n):
        return None
    drawn_NT = draw(ids_n, length, seed)
    protocol = {
        "measure": MEASURE,
        "sequences": SEQUENCES,
        "length": length,
        "tokens": drawn_NT.numel(),
        "lowest_id": int(ids_n.min()),
        "highest_id": int(ids_n.max()),
        "bos": bool(bos),
        "seed": seed,
    }
    ids_NT = after(bos, torch.cat([drawn_NT, drawn_NT], dim=1))

    def copied(rows: slice) -> Tensor:
        right = []
        for ids_BT in ids_NT[rows].to(model.device).split(batch_size):
            # The last token of the first time predicts the first one of the repeat.
            likeliest_BT = last_logits(model, ids_BT, length + 1)[:, :-1].argmax(-1)
            right.append((likeliest_BT == ids_BT[:, -length:].to(likeliest_BT.device)).cpu())
        return torch.cat(right)

    with evaluating(model):
        right = int(team.by_rows(SEQUENCES, copied).sum())
    return Copying(100 * right / drawn_NT.numel(), protocol)


def ordinary_ids(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """Return the ids (n,) to draw from: the middle of a vocabulary, without special tokens.

    Args:
        tokenizer: knows its special and its added tokens.
        vocabulary: the model's number of ids; it may be above the tokenizer's, or below.
    """
    size = min(len(tokenizer), vocabulary)
    # Added tokens are no pieces of text: roles of a chat, markers, places kept free.
    apart = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    middle = range(size * _FROM // _OF, size * _TO // _OF)
    return torch.tensor([x for x in middle if x not in apart])


def draw(ids_n: Tensor, length: int, seed: int) -> Tensor:
    """Return random sequences (N, T) of ids (n,)."""
    random = torch.Generator().manual_seed(seed)
    return ids_n[torch.randint(len(ids_n), (SEQUENCES, length), generator=random)]


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
    team: Team = ALONE,
) -> dict[str, Any]:
    """Measure what a pruned model loses on tokens that need their context.

    Args:
        dense: the dense model.
        pruned: the pruned one; both compute where their parameters are.
        blocks_NT: token ids, T = `span.length`, each after `bos` if there is one.
        span: how much context is asked about.
        bos: what comes before every text.
        batch_size: blocks per forward pass.
        team: processes that read the blocks together.

    Returns:
        `tokens`, `needing` (counts), `lost`, `lost_elsewhere`, `gain` {`before`, `after`}, `kept`,
        and `protocol`; None where no token is of that kind. See `protocol.measures`.
    """
    windows_NT = windows(blocks_NT, span.near, bos)
    together = max(1, batch_size * span.length // windows_NT.shape[1])
    dense_NS, pruned_NS = (
        likelihoods(x, blocks_NT, SCORED, batch_size, team) for x in (dense, pruned)
    )
    short_NS = likelihoods(dense, windows_NT, TOGETHER, together, team).view_as(dense_NS)
    needs_NS, lost_NS = dense_NS - short_NS > NEEDS, dense_NS - pruned_NS
    # Of the pruned model's windows only those count that hold such a token.
    needs_NT = needs_NS.view(len(windows_NT), TOGETHER)
    met_N = needs_NT.any(1)
    own_NT = likelihoods(pruned, windows_NT[met_N], TOGETHER, together, team)
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
        own_NT = _after_bos(blocks_NT.cpu(), bos)[:, : span.length]
        if own_NT.shape[1] == span.length:
            made.append(own_NT)
    if not made:
        return torch.empty(0, span.length).long()
    each = max(1, most // len(made))
    return torch.cat([x[:each] for x in made])[:most]


def _after_bos(blocks_NT: Tensor, bos: Sequence[int]) -> Tensor:
    """Return blocks that all begin with `bos`; of published texts only the first one does."""
    put_NT = after(bos, blocks_NT)
    has_it_N = (put_NT[:, : len(bos)] == blocks_NT[:, : len(bos)]).all(1)
    if not has_it_N.any():
        return put_NT
    return torch.where(has_it_N[:, None], blocks_NT, put_NT[:, : blocks_NT.shape[1]])


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


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel, blocks_NT: Tensor, count: int, batch_size: int, team: Team = ALONE
) -> Tensor:
    """Return the log-probabilities (N, count), in float32, of each block's last tokens."""

    def read(rows: slice) -> Tensor:
        found = []
        for ids_BT in blocks_NT[rows].split(batch_size):
            logits_BSV = last_logits(model, ids_BT.to(model.device), count + 1)[:, :-1]
            targets_BS = ids_BT[:, -count:].to(logits_BSV.device)
            losses_BS = F.cross_entropy(logits_BSV.float().mT, targets_BS, reduction="none")
            found.append(-losses_BS.cpu())
        return torch.cat(found)

    with evaluating(model):
        return team.by_rows(len(blocks_NT), read) if len(blocks_NT) else torch.empty(0, count)


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None
