"""Which tokens stay: the text that says it, the model cut to them, and what that costs."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.console import Output
from nuteprune.data.fingerprint import Fingerprint
from nuteprune.data.held_out import split
from nuteprune.data.specs import iter_documents
from nuteprune.data.tokens import bos_of, end_of
from nuteprune.errors import UserError
from nuteprune.export.gguf.splits import PROBES
from nuteprune.export.vocabulary import check_spelling, cut_model, cut_tokenizer_of
from nuteprune.jobs.job import Job
from nuteprune.judge.perplexity import bits_per_character
from nuteprune.model.anatomy import Anatomy
from nuteprune.run import in_percent
from nuteprune.run_folder import SELF
from nuteprune.shrink.token_use import POSITIONS, WINDOW, Windows
from nuteprune.shrink.vocabulary import Merges, choose
from nuteprune.stages.write import write

MOST_CHARACTERS = 50_000_000
"""Characters in which tokens are counted; text beyond is not read."""
SELF_TOKENS = POSITIONS
"""Tokens that the model writes itself. Its probabilities there say more than the tokens drawn."""
TOGETHER = 1_000_000
"""Characters that are tokenized at a time, about."""
DATA, OWN = "data", "own"
NAMES = {DATA: "DATA", OWN: "what the model writes in all its languages"}
"""The kinds of text that are held out to judge by."""
JUDGED = 6_000
"""Characters of each source that are held out at most."""
SELF_TOKENS_JUDGED = 2_000
"""Tokens that the model writes to be judged by."""
PIECE = 250
"""Characters that are judged together: in UTF-8 at most 1,000 bytes, so as many tokens."""
MOST_COST = 0.01
"""Further bits per character that the fewest tokens may cost, as a share."""
STEPS = 4
"""Sizes that are tried, within each halving of the vocabulary."""
HALVINGS = 4
"""How often the vocabulary is halved at most."""

Bits = Mapping[str, float]
"""Kind of text -> bits per character."""


class VocabText:
    """What tokens are chosen by.

    Args:
        start: token ids before each text.
        length: tokens of a window.
    """

    def __init__(self, start: list[int], length: int) -> None:
        self.start = start
        self.counted: Counter[int] = Counter()
        self.windows = Windows(length)
        self.own: list[list[int]] = []
        self.held_out: dict[str, list[str]] = {}
        self.known = Fingerprint()

    def add(self, texts: Iterable[Sequence[int]]) -> None:
        """Add texts of the user."""
        for ids in texts:
            self.counted.update(ids)
            self.windows.add(ids)

    def hold_out(self, kind: str, texts: Iterable[str], most: int) -> None:
        """Keep some characters of texts to judge by, in pieces that any model can read."""
        held = self.held_out.get(kind, [])
        for text in filter(None, texts):
            if most > 0:
                held += [text[:most][i : i + PIECE] for i in range(0, len(text[:most]), PIECE)]
                most -= len(text)
        if held:
            self.held_out[kind] = held

    def add_own(self, texts: Iterable[Sequence[int]]) -> None:
        """Add self-written text; without other text it counts as the user's too."""
        self.own = [list(ids[: self.windows.length]) for ids in texts]
        if not self.counted:
            self.add(self.own)


def read_text(
    job: Job, length: int, anatomy: Anatomy, tokenizer: PreTrainedTokenizerBase, output: Output
) -> VocabText:
    """Read the text that is named, and let the model write its own, of a length at most."""
    start = bos_of(tokenizer) or end_of(tokenizer)
    text = VocabText(start, max(1, min(WINDOW, length - len(start))))
    with output.bars() as bars, tempfile.TemporaryDirectory() as scratch:
        for spec in [x for x in job.specs if x != SELF]:
            for name, documents in iter_documents(
                spec, text_column=job.text_column, tokenizer=tokenizer
            ).items():
                read = 0
                held: list[str] = []
                for texts in parts(documents):
                    halves = [split(x) for x in texts]
                    held += [x for _, other in halves for x in other]
                    if known := [x for own, _ in halves for x in own]:
                        text.add(tokenizer(known, add_special_tokens=False).input_ids)
                    read += sum(map(len, texts))
                    bars.update(f"counting {name}", read, MOST_CHARACTERS)
                text.known.update(documents.fingerprint)
                if text.counted:
                    text.hold_out(DATA, held, JUDGED)
                else:  # text of a few lines
                    text.add(tokenizer(held, add_special_tokens=False).input_ids)
        kinds = {0: SELF_TOKENS, 1: SELF_TOKENS_JUDGED}
        own, judged = (
            write(
                anatomy.model,
                tokenizer,
                tokens=tokens,
                length=length,
                seed=seed,
                folder=Path(scratch, str(seed)),
                progress=in_percent(bars.update),
            )
            for seed, tokens in kinds.items()
        )
        text.add_own(own)
        text.hold_out(OWN, tokenizer.batch_decode(judged, skip_special_tokens=True), JUDGED)
    return text


def costs(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Return how many more bits each kind of text takes, as people read it."""
    found = [f"{NAMES[x]} {after[x] / before[x] - 1:+.1%}" for x in before]
    return f"bits per character of {', of '.join(found)}"


def parts(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield the documents a few at a time, of about `TOGETHER` characters.

    Args:
        documents: of all of them no more than `MOST_CHARACTERS` are read; the last may be cut.
    """
    part: list[str] = []
    held, left = 0, MOST_CHARACTERS
    for document in documents:
        text = document[:left]
        part.append(text)
        held += len(text)
        left -= len(text)
        if held >= TOGETHER or not left:
            yield part
            part, held = [], 0
        if not left:
            return
    if part:
        yield part


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
