"""The text that `vocab` chooses tokens by, and the text that it judges its choice by."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from nuteprune.console import Output
from nuteprune.data.fingerprint import Fingerprint, split
from nuteprune.data.specs import iter_documents
from nuteprune.data.tokens import bos_of, end_of
from nuteprune.jobs.job import Job
from nuteprune.model.anatomy import Anatomy
from nuteprune.run import in_percent
from nuteprune.run_folder import SELF
from nuteprune.shrink.token_use import POSITIONS, WINDOW, Windows
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
