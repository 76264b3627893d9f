"""Text that a model writes itself: what it knows, to be calibrated and trained on.

All texts of a batch take one token at a time from the first position on, be it given or drawn, so
that none is padded. A text's draws depend on its place alone, not on what the others write.

Shape suffixes: B texts of a batch, V token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from nuteprune.data.openings import CHAT_EVERY, Openings, openings
from nuteprune.data.tokens import bos_of, end_of
from nuteprune.errors import UserError
from nuteprune.files import writing
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.decoding import heads_as_tokens
from nuteprune.processes import several_started
from nuteprune.run_folder import SELF_WRITTEN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 64
"""Texts that are written together."""
_CACHE_BYTES = 2**32  # most memory for keys and values; models with many get smaller batches

TIMED = 4
"""Positions that an estimate of time is taken from; the first ones warm up."""

Progress = Callable[[int, int], None]


def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    seed: int,
    folder: Path,
    progress: Progress = lambda done, total: None,
) -> list[list[int]]:
    """Let a model write text, drawn at temperature 1, and keep it in a file.

    A text begins with a token that is drawn, each time another one, after what the tokenizer
    begins a text with, or after end-of-text. Where there is a chat template every fourth text is a
    chat instead: the model writes a user's question and the answer. It goes on to where the model
    ends it, or to a block's length.

    The file is written batch by batch. Called again with the same arguments, whole batches in it
    are kept, and the rest is written as if there had been no break, to the byte.

    Args:
        model: the model, before anything is changed in it.
        tokenizer: its tokenizer.
        tokens: how many there are at least.
        length: tokens per block of training; a text fills one block at most.
        seed: draws the first tokens and what is written.
        folder: where the file is, by the name of `run_folder.SELF_WRITTEN`; made if need be.
        progress: told how many tokens there are, and how many are asked for.

    Returns:
        Token ids of each text, ended by the token that ends a text, as `training_blocks` takes
        them.

    Raises:
        UserError: the folder is no place to write to, or the length leaves no room for text.
        RunFailed: writing the file failed on the way.
    """
    end = end_of(tokenizer)
    most = length - len(bos_of(tokenizer)) - len(end)  # as `training_blocks` cuts them
    if most < 2 or tokens < 1:
        raise UserError(f"{tokens} tokens in blocks of {length}: pass a greater length")
    opening = openings(model, tokenizer, most=most, seed=seed)
    size = min(_fitting(model, length), -(-tokens // (most + len(end))))
    key = _key(model, opening, most, size, seed)
    path = folder / SELF_WRITTEN
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    with _one_process(path):
        texts, kept = _read(path, key, size)
        if path.is_file() and path.stat().st_size > kept:
            _append(path, kept, b"")
        while (have := sum(map(len, texts))) < tokens:
            number = len(texts) // size
            batch = [_Text(opening, i) for i in range(number * size, (number + 1) * size)]
            draws = random.Random(f"{seed} {number}").getrandbits(63)
            generator = torch.Generator().manual_seed(draws)
            for written in _write(model, opening, batch, most, generator):
                progress(min(have + written, tokens), tokens)
            ended = [x.ids if x.ended else [*x.ids, *end] for x in batch]
            lines = [_line(tokenizer, opening, ids, number, key) for ids in ended]
            kept = _append(path, kept, "".join(lines).encode())
            texts += ended
        progress(tokens, tokens)
    while sum(map(len, texts[:-size])) >= tokens:  # of a call that asked for more
        del texts[-size:]
    return texts


def seconds_to_write(model: PreTrainedModel, *, tokens: int, length: int) -> float:
    """Return about how long `write_text` takes, by timing the first positions of a batch.

    Texts are taken to fill their blocks, and later positions to cost no more than the first.

    Args:
        model: the model.
        tokens: how many there are to be.
        length: tokens per block.
    """
    size = min(_fitting(model, length), -(-tokens // length))
    cache: dict[str, Any] = {}
    seconds = []
    for _ in range(TIMED):
        started = time.monotonic()
        logits_BV, cache = _step(model, [0] * size, cache)
        draw(logits_BV, torch.zeros(size, dtype=torch.float64)).tolist()
        seconds.append(time.monotonic() - started)
    return min(seconds) * length * -(-tokens // (size * length))


class _Text:
    """A text that is being written.

    Args:
        opening: how texts begin.
        number: which text it is.
    """

    def __init__(self, opening: Openings, number: int) -> None:
        self.opening = opening
        self.given = deque(opening.given(number))
        self.asks = opening.is_chat(number)
        self.ids: list[int] = []
        self.ended = False

    def take(self, drawn: int) -> int:
        """Go on by a token: the next that is given, or else the one that the model draws."""
        answers = self.opening.answers
        if self.ended:
            return self.ids[-1]
        if self.asks and not self.given and drawn in self.opening.asked:
            self.asks = False
            self.given.extend(answers)
        if self.given:
            self.ids.append(self.given.popleft())
            return self.ids[-1]
        self.ids.append(drawn)
        if self.asks and tuple(self.ids[-len(answers) :]) == answers:
            self.asks = False  # some models go on to the answer by themselves
        self.ended = drawn in self.opening.ends
        return drawn


def _write(
    model: PreTrainedModel,
    opening: Openings,
    batch: Sequence[_Text],
    most: int,
    generator: torch.Generator,
) -> Iterator[int]:
    """Write a batch of texts of at most `most` tokens each; yields how many tokens there are."""
    total = len(opening.start) + most
    cache: dict[str, Any] = {}
    drawn_B = torch.zeros(len(batch), dtype=torch.long)
    for position in range(total):
        if position < len(opening.start):
            next_B = [opening.start[position]] * len(batch)
        else:
            next_B = [x.take(i) for x, i in zip(batch, drawn_B.tolist(), strict=True)]
        yield sum(len(x.ids) for x in batch)
        if position == total - 1 or all(x.ended for x in batch):
            return
        numbers_B = torch.rand(len(batch), generator=generator, dtype=torch.float64)
        logits_BV, cache = _step(model, next_B, cache)
        drawn_B = draw(logits_BV[:, : opening.known], numbers_B)


@torch.no_grad()
def _step(
    model: PreTrainedModel, next_B: list[int], cache: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    ids_B1 = torch.tensor(next_B, device=model.device)[:, None]
    training = model.training
    model.eval()
    try:
        with heads_as_tokens():
            made: Any = model(input_ids=ids_B1, use_cache=True, **cache)
    finally:
        model.train(training)
    name = "cache" if "cache" in made else "past_key_values"  # by version
    return made.logits[:, -1], {name: made[name]}


def draw(logits_BV: Tensor, numbers_B: Tensor) -> Tensor:
    """Draw token ids (B,) at temperature 1: where each number falls in the summed probabilities.

    Args:
        logits_BV: the model's logits.
        numbers_B: evenly distributed in [0, 1).
    """
    # Apple's GPUs know no 64 bits.
    dtype = torch.float32 if logits_BV.device.type == "mps" else torch.float64
    sums_BV = logits_BV.to(dtype).softmax(-1).cumsum(-1)
    sought_B = numbers_B.to(logits_BV.device, dtype) * sums_BV[:, -1]
    found_B1 = torch.searchsorted(sums_BV, sought_B[:, None], right=True)
    return found_B1[:, 0].clamp(max=logits_BV.shape[1] - 1)


def most_cached(model: PreTrainedModel, length: int) -> int:
    """Return the bytes of keys and values that are held while a model writes blocks of a length."""
    return _fitting(model, length) * _cached(model, length)


def _fitting(model: PreTrainedModel, length: int) -> int:
    """Return how many texts are written together, by the size of their keys and values."""
    return max(1, min(BATCH, _CACHE_BYTES // max(_cached(model, length), 1)))


def _cached(model: PreTrainedModel, length: int) -> int:
    """Return the bytes of keys and values of a text."""
    anatomy = Anatomy(model)
    heads = sum(layer.kv_heads for layer in anatomy.shape.layers)
    return round(anatomy.cached_features * length * heads * model.dtype.itemsize)


def _key(model: PreTrainedModel, opening: Openings, most: int, size: int, seed: int) -> str:
    """Return what tells a file of the same text from one that another run has left."""
    weights = Anatomy(model).embedding.weight.flatten()[:64].tolist()
    facts = [weights, sorted(opening.ends), opening.known, opening.start, opening.firsts]
    facts += [opening.asks, opening.answers, CHAT_EVERY, most, size, seed]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def _line(
    tokenizer: PreTrainedTokenizerBase, opening: Openings, ids: list[int], batch: int, key: str
) -> str:
    text = tokenizer.decode(ids[:-1] if ids[-1] in opening.ends else ids)
    return json.dumps({"text": text, "ids": ids, "batch": batch, "key": key}) + "\n"


def _read(path: Path, key: str, size: int) -> tuple[list[list[int]], int]:
    """Return the texts of whole batches, and how many bytes those are."""
    texts: list[list[int]] = []
    batch: list[list[int]] = []
    kept = seen = 0
    try:
        with path.open("rb") as file:
            for line in file:
                row = json.loads(line)
                whose = (row["key"], row["batch"])
                if whose != (key, len(texts) // size) or not line.endswith(b"\n"):
                    break
                seen += len(line)
                batch.append(row["ids"])
                if len(batch) == size:
                    texts += batch
                    kept, batch = seen, []
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):  # a line that was being written, or is not ours
        pass
    return texts, kept


def _append(path: Path, kept: int, lines: bytes) -> int:
    """Write lines behind the bytes that are kept, and return how many bytes there are then."""
    with writing(path, "go on with --resume"), path.open("ab") as file:
        file.truncate(kept)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
    return kept + len(lines)


@contextmanager
def _one_process(path: Path) -> Iterator[None]:
    """Let one process of a run write, while the others wait to read what it wrote."""
    if not several_started():
        yield
        return
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield
