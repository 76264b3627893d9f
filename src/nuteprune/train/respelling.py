"""Trains a model with fewer tokens to read and to write words that are spelled in parts now.

Its teacher is the model with all tokens. Where a word begins, the teacher's chances of all words
that begin with the same part add up to that part's. Within a word the text itself teaches.

Shape suffixes: T positions of a text, V token ids of the teacher, K of the student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.model.adapters import add_lora
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.forwards import evaluating
from nuteprune.shrink.finalize import merge_lora
from nuteprune.shrink.vocabulary import Merges

STEPS = 24
"""Steps after which words in parts cost little more; see docs/vocabulary.md."""
TEXTS = 4
"""Texts of a step."""
MOST = 0.35
"""Of a text at most this share is spelled anew: beyond, it is of a script that is given up."""
_RATE, _RANK, _WARM_UP = 1e-3, 16, 5
Spellings = Sequence[tuple[int, ...]]


class Respelled(NamedTuple):
    """A text as teacher and student read it.

    Args:
        whole: the teacher's ids, after what a text begins with.
        parts: the student's.
        starts: how many ids it begins with.
        ends: positions of the student's from which a new word is told.
        within: positions from which a further part of a word is.
    """

    whole: list[int]
    parts: list[int]
    starts: int
    ends: list[int]
    within: list[int]


def spellings(merges: Merges, small: PreTrainedTokenizerBase, rows: int) -> list[tuple[int, ...]]:
    """Return how the smaller tokenizer spells each token of the full one, by the full one's id.

    Args:
        merges: of the full tokenizer.
        small: the smaller one.
        rows: of the full embedding; what no text has is spelled with nothing.
    """
    kept, model = small.get_vocab(), small.backend_tokenizer.model
    found: list[tuple[int, ...]] = [()] * rows
    for token, i in merges.all_ids.items():
        if token in kept:
            found[i] = (kept[token],)
        elif token not in merges.added:
            found[i] = tuple(x.id for x in model.tokenize(token))
    return found


def respelled(ids: Sequence[int], start: Sequence[int], how: Spellings) -> Respelled | None:
    """Return a text as both read it; None if nothing of it is spelled anew, or too much.

    Args:
        ids: of the full tokenizer.
        start: ids that a text begins with.
        how: of `spellings`.
    """
    words = [how[i] for i in ids if how[i]]
    anew = sum(len(x) > 1 for x in words)
    if len(words) < len(ids) or not 0 < anew <= MOST * len(words):
        return None
    parts = [x for i in start for x in how[i]]
    ends, within = [], []
    for word in words:
        ends.append(len(parts) - 1)
        within += range(len(parts), len(parts) + len(word) - 1)
        parts += word
    return Respelled([*start, *ids], parts, len(start), ends, within)


def alternating(
    shown: Sequence[Sequence[int]],
    own: Sequence[Sequence[int]],
    start: Sequence[int],
    how: Spellings,
    count: int,
) -> list[Respelled]:
    """Return texts to learn from, in turns of either kind, those first that are respelled most.

    Args:
        shown: the user's texts, ids of the full tokenizer.
        own: what the model has written.
        start: ids that a text begins with.
        how: of `spellings`.
        count: texts at most.
    """
    kinds = []
    for texts in (shown, own):
        found = [x for ids in texts if (x := respelled(ids, start, how))]
        found.sort(key=lambda x: len(x.within) / len(x.parts), reverse=True)
        kinds.append(found[: count // 2])
    return [x for pair in zip_longest(*kinds) for x in pair if x is not None]


def loss_of(
    teacher: PreTrainedModel, student: torch.nn.Module, text: Respelled, first_V: Tensor, count: int
) -> Tensor:
    """Return the mean loss of a text's positions.

    Args:
        teacher: the model with all tokens.
        student: the one with fewer.
        text: what both read.
        first_V: the first part of each of the teacher's tokens.
        count: tokens of the student.
    """
    with torch.no_grad():
        logits_TV = teacher(input_ids=torch.tensor([text.whole]), use_cache=False).logits[0]
        chances_TV = logits_TV[text.starts - 1 : -1, : len(first_V)].float().softmax(-1)
        wanted_TK = torch.zeros(len(chances_TV), count).index_add_(1, first_V, chances_TV)
    logits_TK = student(input_ids=torch.tensor([text.parts]), use_cache=False).logits[0].float()
    logs_TK = logits_TK.log_softmax(-1)
    loss = F.kl_div(logs_TK[text.ends], wanted_TK, reduction="sum")
    further = torch.tensor([text.parts[i + 1] for i in text.within], dtype=torch.long)
    loss = loss + F.nll_loss(logs_TK[text.within], further, reduction="sum")
    return loss / (len(text.ends) + len(text.within))


def heal(
    teacher: PreTrainedModel,
    small: PreTrainedModel,
    texts: Sequence[Respelled],
    how: Spellings,
    steps: int,
    progress: Callable[[str, int, int], None],
) -> PreTrainedModel:
    """Train the smaller model's projections, by LoRA that is merged into them; returns the model.

    Args:
        teacher: the model with all tokens; it stays as it is.
        small: the same with fewer.
        texts: what is read, one after another, as often as need be.
        how: of `spellings`.
        steps: of training.
        progress: told how far it has come.
    """
    if not texts or not steps:
        return small
    first_V = torch.tensor([x[0] if x else 0 for x in how])
    count = small.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = add_lora(Anatomy(small), r=_RANK, lora_alpha=_RANK)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0)
    with evaluating(teacher), evaluating(student):
        for step in range(steps):
            progress("learning to spell", step, steps)
            slow = min(1, (step + 1) / _WARM_UP) * (1 - step / steps)
            optimizer.param_groups[0]["lr"] = _RATE * slow
            for i in range(step * TEXTS, (step + 1) * TEXTS):
                loss = loss_of(teacher, student, texts[i % len(texts)], first_V, count)
                (loss / TEXTS).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    progress("learning to spell", steps, steps)
    return merge_lora(student)
