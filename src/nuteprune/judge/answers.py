"""Compares a pruned model's answers with the dense one's: loops, and distance.

Both models answer the same prompts greedily. The figures that compare distributions are taken
along given answers, so that one early difference does not decide all that comes after it.

Shape suffixes: B prompts, T tokens, n tokens of an answer, V token ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data.decoding import fitting
from nuteprune.data.prompts import Prompts
from nuteprune.data.tokens import ends_of, texts_of
from nuteprune.errors import UserError
from nuteprune.model.forwards import evaluating, head_at_once, heads_as_tokens, last_logits
from nuteprune.model.weights import is_sharded
from nuteprune.processes import ALONE, Team

TOKENS: Final = 64
"""Tokens of an answer at most, where nothing else is said."""
GRAM: Final = 4
LOOPS: Final = 0.5
"""An answer loops if more than this share of its 4-grams are repeats."""

MEASURES: Final[Mapping[str, str]] = {
    "looping": "percent of the answers of which more than half of the 4-grams are repeats of an "
    "earlier one in the same answer",
    "repeated": "percent of an answer's 4-grams that are repeats, mean over the answers",
    "length": "tokens of an answer, with the one that ends it, mean over the answers",
    "kl": "KL divergence of the pruned from the dense model's next-token distribution, along the "
    "dense model's answers: nats per token",
    "agreement": "percent of the dense model's tokens for which both models hold the same token "
    "for the likeliest",
    "nats": "how strange each model's own answers are to the dense model: its negative "
    "log-likelihood per token, up to an answer's first repeated 4-gram",
}
"""What each figure is."""


@dataclass(frozen=True)
class Pair:
    """Both models' answers to a prompt.

    Args:
        prompt: the prompt, as people read it.
        dense: the dense model's answer: token ids, with the one that ends it.
        pruned: the pruned model's.
        kl: nats, summed over the tokens of `dense`.
        agreed: how many of these tokens both models predict alike.
        nats: the dense model's negative log-likelihood of the tokens of `dense` and of `pruned` up
            to the first repeated 4-gram, summed.
    """

    prompt: str
    dense: list[int]
    pruned: list[int]
    kl: float
    agreed: int
    nats: tuple[float, float]


def repeats(ids: Sequence[int]) -> Iterator[bool]:
    """Yield for each token of an answer whether it completes a 4-gram again."""
    seen = set[tuple[int, ...]]()
    for i in range(1, len(ids) + 1):
        gram = tuple(ids[max(0, i - GRAM) : i])
        yield gram in seen
        seen |= {gram} if len(gram) == GRAM else set()


def repeated(ids: Sequence[int]) -> float:
    """Return the share of an answer's 4-grams that repeat an earlier one."""
    return sum(repeats(ids)) / max(1, len(ids) - GRAM + 1)


def fresh(ids: Sequence[int]) -> int:
    """Return how many tokens of an answer come before its first repeated 4-gram."""
    return next((i - GRAM + 1 for i, again in enumerate(repeats(ids)) if again), len(ids))


def answer_both(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    tokens: int = TOKENS,
    team: Team = ALONE,
) -> list[Pair]:
    """Let both models answer, and read each other's answers.

    Args:
        dense: the dense model.
        pruned: the pruned one; both compute where their parameters are.
        tokenizer: of both.
        prompts: those to answer.
        tokens: most tokens per answer.
        team: processes that share the prompts out.

    Raises:
        UserError: if a prompt leaves no position for an answer.
    """
    ends = ends_of(dense, tokenizer)
    both = [write(model, prompts.ids, ends, tokens, team) for model in (dense, pruned)]
    rows = list(zip(prompts.ids, *both, strict=True))

    def compared(here: slice) -> Tensor:
        found = [_compared(dense, pruned, *row) for row in rows[here]]
        return torch.tensor(found, dtype=torch.float64).view(-1, 4)

    figures = team.by_rows(len(rows), compared).tolist()
    told: Any = zip(prompts.texts, *both, figures, strict=True)
    return [Pair(text, own, other, x[0], int(x[1]), (x[2], x[3])) for text, own, other, x in told]


def write(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    ends: Collection[int],
    most: int,
    team: Team = ALONE,
) -> list[list[int]]:
    """Return a model's greedy answers: the likeliest token each time, whatever its settings say.

    Prompts are padded on the left and answered together, as many as the KV cache has room for.

    Args:
        model: a causal LM.
        prompts: token ids of each.
        ends: tokens that end an answer.
        most: tokens of an answer at most; fewer where the model has no more positions.
        team: processes that share the prompts out.

    Returns:
        Token ids of each answer, at least one.

    Raises:
        UserError: if a prompt leaves no position for an answer.
    """
    longest = max(map(len, prompts))
    positions = getattr(model.config, "max_position_embeddings", None) or longest + most
    if longest >= positions:
        raise UserError(
            f"a prompt has {longest} tokens, and the model knows {positions} positions; pass "
            "shorter prompts"
        )
    most = min(most, positions - longest)
    together = fitting(model, longest + most)
    padding = prompts[0][0]  # a token that the model has; nothing reads it
    ids_NT = torch.tensor([[padding] * (longest - len(x)) + x for x in prompts])
    seen_NT = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts])

    def answers(rows: slice) -> Tensor:
        found_Nn = torch.full((len(ids_NT[rows]), most), padding)
        for start in range(0, len(found_Nn), together):
            here = slice(start, start + together)
            made_BT = cast(Any, model).generate(
                input_ids=ids_NT[rows][here].to(model.device),
                attention_mask=seen_NT[rows][here].to(model.device),
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=padding,
                synced_gpus=is_sharded(model),  # all go on until the last one has ended
            )
            found_Nn[here, : made_BT.shape[1] - longest] = made_BT[:, longest:].cpu()
        return found_Nn

    with evaluating(model), _plain(model, ends), head_at_once(model), heads_as_tokens():
        found = team.by_rows(len(prompts), answers).tolist()
    return [_up_to_end(row, ends) for row in found]


@contextmanager
def _plain(model: PreTrainedModel, ends: Collection[int]) -> Iterator[None]:
    """Let a model end texts by these tokens, and ignore its settings of generation."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None)
    try:
        yield
    finally:
        model.generation_config = own


def _up_to_end(ids: list[int], ends: Collection[int]) -> list[int]:
    last = next((i for i, x in enumerate(ids) if x in ends), len(ids))
    return ids[: last + 1]


@torch.no_grad()
def _compared(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    prompt: list[int],
    own: list[int],
    other: list[int],
) -> list[float]:
    """Return a pair's `kl`, `agreed`, and both of its `nats`."""
    sure_nV, kept_nV = (_log_probabilities(model, prompt, own) for model in (dense, pruned))
    kept_nV = kept_nV.to(sure_nV.device)
    agreed = (sure_nV.argmax(-1) == kept_nV.argmax(-1)).sum()
    chance_nV = sure_nV.exp()
    apart_nV = chance_nV * (sure_nV - kept_nV)
    kl = apart_nV[chance_nV > 0].sum()  # what the dense model rules out has no finite logarithm
    strange = other[: fresh(other)]
    nats = _nats(sure_nV, own[: fresh(own)])
    return [
        float(kl),
        float(agreed),
        nats,
        _nats(_log_probabilities(dense, prompt, strange), strange),
    ]


def _log_probabilities(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> Tensor:
    """Return the log-probabilities (n, V) in float32 from which each token of an answer comes."""
    ids_BT = torch.tensor([[*prompt, *answer]], device=model.device)
    with evaluating(model):
        return F.log_softmax(last_logits(model, ids_BT, len(answer) + 1)[0, :-1].float(), -1)


def _nats(log_nV: Tensor, ids: Sequence[int]) -> float:
    at_n1 = torch.tensor(ids, device=log_nV.device)[:, None]
    return -float(log_nV[: len(ids)].gather(1, at_n1).sum())


def entry_of(pairs: Sequence[Pair], source: str, tokens: int = TOKENS) -> dict[str, Any]:
    """Return what a record says of answers; see `MEASURES`.

    Args:
        pairs: answers to each prompt, at least one.
        source: where the prompts come from.
        tokens: most tokens per answer.
    """
    both = {"before": [x.dense for x in pairs], "after": [x.pruned for x in pairs]}
    count = sum(len(x.dense) for x in pairs)
    read = {when: sum(map(fresh, answers)) for when, answers in both.items()}
    return {
        "looping": {
            when: 100 * fmean(repeated(x) > LOOPS for x in answers)
            for when, answers in both.items()
        },
        "repeated": {when: 100 * fmean(map(repeated, x)) for when, x in both.items()},
        "length": {when: fmean(map(len, x)) for when, x in both.items()},
        "kl": sum(x.kl for x in pairs) / count,
        "agreement": 100 * sum(x.agreed for x in pairs) / count,
        "nats": {when: sum(x.nats[i] for x in pairs) / read[when] for i, when in enumerate(both)},
        "protocol": {
            "measures": dict(MEASURES),
            "prompts": source,
            "answers": len(pairs),
            "most_tokens": tokens,
            "tokens": count,
            "tokens_for_nats": read,
        },
    }


def pick_samples(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Return the median and the worst answers as the report reads them.

    The pruned model's answers are put in order by their share of repeated 4-grams, and where that
    is the same by the KL divergence along the dense model's answer.
    """
    order = sorted(pairs, key=lambda x: (repeated(x.pruned), x.kl / len(x.dense)))
    picked = {"median": order[(len(order) - 1) // 2], "worst": order[-1]}
    found = []
    for which, pair in picked.items():
        told = texts_of(tokenizer, [pair.dense, pair.pruned], skip_special_tokens=True)
        dense, pruned = (text.strip() for text in told)
        row = {"which": which, "prompt": pair.prompt.strip(), "dense": dense, "pruned": pruned}
        found.append(row)
    return found
