"""A model cut to some of its tokens, and what that costs; the fewest that cost little."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.errors import UserError
from nuteprune.export.gguf.splits import PROBES
from nuteprune.export.vocabulary import check_spelling, cut_model, cut_tokenizer_of
from nuteprune.judge.perplexity import bits_per_character
from nuteprune.model.anatomy import Anatomy
from nuteprune.shrink.vocabulary import Merges, choose

MOST_COST = 0.01
"""Further bits per character that the fewest tokens may cost, as a share."""
STEPS = 4
"""Sizes that are tried, within each halving of the vocabulary."""
HALVINGS = 4
"""How often the vocabulary is halved at most."""

Bits = Mapping[str, float]
"""Kind of text -> bits per character."""


@dataclass(frozen=True)
class Smaller:
    """A model with some of its tokens.

    Args:
        kept: ids that stay, growing.
        model: the model.
        tokenizer: its tokenizer.
        bits: what each kind of text takes.
    """

    kept: list[int]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bits: Bits


@dataclass(frozen=True)
class Cutter:
    """Cuts a model to some of its tokens.

    Args:
        anatomy: the model; it stays as it is.
        tokenizer: its tokenizer.
        merges: of the tokenizer.
        needed: ids that stay in any case.
        use: how often each token is used.
        texts: text to judge by, by kind, the kind that decides first; none of it is empty.
    """

    anatomy: Anatomy
    tokenizer: PreTrainedTokenizerBase
    merges: Merges
    needed: set[int]
    use: Sequence[float]
    texts: Mapping[str, Sequence[str]]

    @cached_property
    def bits(self) -> Bits:
        """What each kind of text takes with all tokens."""
        return self._bits(self.anatomy.model, self.tokenizer)

    def _bits(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bits:
        return {x: bits_per_character(model, tokenizer, y) for x, y in self.texts.items()}

    def cut(self, keep: int) -> Smaller:
        """Return the model with `keep` tokens.

        Raises:
            UserError: if more than that have to stay, or it has no more.
            RunFailed: if the tokenizer that is left does not spell what the full one does.
        """
        kept = choose(self.merges, self.use, keep, self.needed)
        model_type = self.anatomy.model.config.model_type
        tokenizer = cut_tokenizer_of(self.tokenizer, self.merges, kept, model_type)
        check_spelling(self.tokenizer, tokenizer, PROBES)
        model = cut_model(self.anatomy, kept)
        return Smaller(kept, model, tokenizer, self._bits(model, tokenizer))

    def cost(self, smaller: Smaller) -> float:
        """Return the share of further bits per character, of the first kind of text.

        A model of many languages writes in all of them, and DATA says which of them stay.
        """
        for kind, bits in self.bits.items():
            return smaller.bits[kind] / bits - 1
        return math.inf  # without text nothing is known

    def fewest(self, tell: Callable[[Smaller], None]) -> Smaller:
        """Return the model with the fewest tokens that cost at most `MOST_COST`.

        Args:
            tell: called with each model that is tried.

        Raises:
            UserError: if there is none.
        """
        all_tokens = len(set(self.merges.all_ids.values()))
        sizes = [round(all_tokens / 2 ** (i / STEPS)) for i in range(1, STEPS * HALVINGS + 1)]
        best, low, high = None, 0, len(sizes)
        while low < high:  # the more go, the more it costs
            middle = (low + high) // 2
            try:
                tell(tried := self.cut(sizes[middle]))
            except UserError:  # more than that have to stay
                high = middle
                continue
            if self.cost(tried) <= MOST_COST:
                best, low = tried, middle + 1
            else:
                high = middle
        if best is None:
            raise UserError(
                f"fewer tokens cost more than {MOST_COST:.0%} here: pass a number in place of auto"
            )
        return best
