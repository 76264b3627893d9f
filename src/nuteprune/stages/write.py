"""Write: the dense model writes its share of the text, which is kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from nuteprune.data.decoding import (
    BatchSizes,
    WriteBatch,
    fitting,
    next_batch,
    seconds_per_token,
    write_batch,
)
from nuteprune.data.tokens import Openings, bos_of, end_of, openings, texts_of
from nuteprune.data.training_text import written_blocks
from nuteprune.errors import UserError
from nuteprune.files import writing
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.weights import home_of
from nuteprune.processes import ALONE, Team, is_main, main_ones
from nuteprune.run_folder import SELF_WRITTEN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OWN_SHARE = 0.5
"""Share of the text that the model writes itself, by default. Calibrated on one kind of text alone,
a model keeps that and forgets the rest; see docs/quality.md."""
ONCE = 1600
"""Blocks of training up to which the model writes all of its share: 400 steps of 4."""
READINGS = 4
"""How often longer training reads self-written text at most."""
Progress = Callable[[int, int], None]
SIGNS = 4096
"""Number of values of each weight whose signs tell one model from another."""


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    seed: int,
    folder: Path,
    progress: Progress = lambda done, total: None,
    team: Team = ALONE,
    engine: WriteBatch | None = None,
) -> list[list[int]]:
    """Let a model write text, drawn at temperature 1, and keep it in a file.

    A text begins with what the tokenizer begins texts with, or with end-of-text. A drawn token
    follows, each time another one (`tokens.TEMPERATURE`). The model ends the text, after
    `decoding.TEXT_TOKENS` tokens at most. With a chat template a quarter of the tokens is chats:
    the model writes a user's question and the answer, of a block's length at most.

    The file is written batch by batch. A second call with the same arguments keeps whole batches
    and writes the rest as if without a break, to the byte. All processes of a run call it, and the
    main one keeps the file.

    Args:
        model: the dense model; LoRA on it is disabled.
        tokenizer: its tokenizer.
        tokens: how many to write at least.
        length: tokens per block of training; a chat fills one block at most.
        seed: draws the first tokens and what is written.
        folder: where the file is, by the name of `run_folder.SELF_WRITTEN`; made if need be.
        progress: told how many tokens are written, and how many are asked for.
        team: processes that hold the model, and share the texts of a batch out.
        engine: what writes batches in the model's place, to bytes of its own; such as
            `data.vllm_writer.VllmWriter`.

    Returns:
        Token ids of each text, ended by the token that ends a text, as `training_blocks` takes
        them.

    Raises:
        UserError: the folder is no place to write to, or the length leaves no room for text.
        RunFailed: writing the file failed on the way.
    """
    end = end_of(tokenizer)
    opening, sizes = _how(model, tokenizer, tokens, length, seed)
    about = {**known_by(model, tokenizer), "key": _key(model, opening, sizes, seed, engine)}
    path = folder / SELF_WRITTEN
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    found, kept = main_ones(_read(path, about))
    if is_main() and path.is_file() and path.stat().st_size > kept:
        _append(path, kept, b"")
    while (have := _tokens(found)) < tokens:
        batch, longest = next_batch(opening, sizes, [_tokens([x]) for x in found])
        number = len(found)
        draws = random.Random(f"{seed} {number}").getrandbits(63)
        generator = torch.Generator().manual_seed(draws)
        how = opening, batch, longest, generator, team
        for written in engine(*how) if engine else write_batch(model, *how):
            progress(min(have + written, tokens), tokens)
        ended = [x.ids if x.ended else [*x.ids, *end] for x in batch]
        of = {"batch": number, "of": len(ended), **about}
        lines = [_line(tokenizer, opening, ids) | of for ids in ended]
        if is_main():
            text = "".join(json.dumps(x) + "\n" for x in lines)
            kept = _append(path, kept, text.encode())
        found.append(ended)
    progress(tokens, tokens)
    while _tokens(found[:-1]) >= tokens:  # of a call that asked for more
        del found[-1]
    return [ids for batch in found for ids in batch]


def tokens_to_write(blocks: int, calibrated: int, share: float, length: int) -> int:
    """Return how many tokens a model writes itself.

    Args:
        blocks: how many the run reads.
        calibrated: how many of these it reads before the first step.
        share: the model's share of the run's blocks.
        length: tokens per block.
    """
    once = max(calibrated, min(blocks, ONCE))
    return written_blocks(max(1, round(share * max(once, blocks / READINGS)))) * length


def _how(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, seed: int
) -> tuple[Openings, BatchSizes]:
    """Return how texts begin, and what batches they are written in; errors as `write`."""
    most = room(tokenizer, length)
    if tokens < 1:
        raise UserError(f"{tokens} tokens to write: pass at least 1")
    opening = main_ones(openings(model, tokenizer, most=most, seed=seed))
    return opening, BatchSizes.of(opening, tokens, most, fitting(model, length))


def _tokens(found: list[list[list[int]]]) -> int:
    return sum(len(ids) for batch in found for ids in batch)


def seconds_to_write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int
) -> float:
    """Return about how long `write` takes, by timing the first positions of its batches.

    Texts are taken to be as long as they may be.
    """
    end = len(end_of(tokenizer))
    opening, sizes = _how(model, tokenizer, tokens, length, seed=0)
    seconds, written = dict[int, float](), list[int]()
    total = 0.0
    while sum(written) < tokens:
        batch, longest = next_batch(opening, sizes, written)
        size = len(batch)
        seconds[size] = seconds.get(size) or seconds_per_token(model, size)
        total += seconds[size] * (len(opening.start) + longest - 1)
        written.append(size * (longest + end))
    return total


def room(tokenizer: PreTrainedTokenizerBase, length: int) -> int:
    """Return how many tokens of a block a text has at most, as `training_blocks` cuts them.

    Raises:
        UserError: if the length leaves no room for text.
    """
    most = length - len(bos_of(tokenizer)) - len(end_of(tokenizer))
    if most < 2:
        raise UserError(f"blocks of {length} tokens have no room for text: pass a greater length")
    return most


def read_written(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, tokens: int
) -> list[list[int]]:
    """Return text that `write` left in a file, with any seed, length and number of tokens.

    Args:
        path: the file.
        model: the model that has written it, in any dtype.
        tokenizer: its tokenizer.
        tokens: how many are needed; batches after these are not read.

    Returns:
        Token ids of each text, as `write` returns them.

    Raises:
        UserError: the file cannot be read, is of another model or tokenizer, or is too short.
    """
    known = known_by(model, tokenizer)
    found: list[list[int]] = []
    have, batch = 0, None
    for row in _rows(path, Anatomy(model).embedding.weight.shape[0]):
        if have >= tokens and row["batch"] != batch:
            break
        if other := [what for what in known if row[what] != known[what]]:
            raise UserError(
                f"{path} was written with another {other[0]} than this run's: write text of this "
                f"model with nuteprune write, or pass the file as --data {path}"
            )
        found.append(row["ids"])
        have, batch = have + len(row["ids"]), row["batch"]
    if have < tokens:
        raise UserError(
            f"{path} has {have} tokens, and this run needs {tokens}: write more, with nuteprune "
            f"write --tokens {tokens}"
        )
    return found


def _rows(path: Path, vocabulary: int) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file that `write` left; errors as of `read_written`."""
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; name a file of nuteprune write"
        ) from error
    with file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                row = {x: row[x] for x in ("ids", "batch", "model", "tokenizer")}
                known = all(type(x) is int and 0 <= x < vocabulary for x in row["ids"])
            except (ValueError, LookupError, TypeError, RecursionError):
                known = False
            if not known:
                raise UserError(
                    f"line {number} of {path} is none that nuteprune write has written: name a "
                    f"file of that command, or pass this one as --data {path}"
                )
            yield row


def known_by(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return hashes of a model and its tokenizer, which mark the text that they write.

    A model is known by its shape and by the signs of weights of all layers, which are the same in
    any dtype; a tokenizer by its tokens, and by those that begin and end a text.
    """
    anatomy, signs = Anatomy(model), hashlib.blake2b(digest_size=8)
    signs.update(json.dumps(anatomy.shape.to_dict()).encode())
    layers = (x for layer in anatomy.layers for x in layer.named_parameters())
    own = (x for name, x in layers if "lora_" not in name)
    for weight in (anatomy.embedding.weight, *own):
        stored = home_of(weight)
        whole = stored.full_tensor() if isinstance(stored, DTensor) else stored
        signs.update(whole.flatten()[:SIGNS].signbit().cpu().numpy().tobytes())
    tokens = sorted((number, str(token)) for token, number in tokenizer.get_vocab().items())
    facts = json.dumps([tokens, bos_of(tokenizer), end_of(tokenizer)])
    said = hashlib.blake2b(facts.encode(), digest_size=8)
    return {"model": signs.hexdigest(), "tokenizer": said.hexdigest()}


def _key(
    model: PreTrainedModel,
    opening: Openings,
    sizes: BatchSizes,
    seed: int,
    engine: WriteBatch | None,
) -> str:
    """Return what tells a file of the same text from one that the model wrote otherwise."""
    facts = [str(model.dtype), sorted(opening.ends), opening.known, opening.start]
    # The order of first tokens follows from the model and the seed, but for rounding.
    facts += [sorted(opening.firsts), opening.asks, opening.answers, opening.chats, sizes, seed]
    facts += [type(engine).__name__] if engine else []
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def _line(tokenizer: PreTrainedTokenizerBase, opening: Openings, ids: list[int]) -> dict[str, Any]:
    [text] = texts_of(tokenizer, [ids[:-1] if ids[-1] in opening.ends else ids])
    return {"text": text, "ids": ids}


def _read(path: Path, about: dict[str, str]) -> tuple[list[list[list[int]]], int]:
    """Return the texts of whole batches, batch by batch, and how many bytes those are."""
    found: list[list[list[int]]] = []
    batch: list[list[int]] = []
    kept = seen = 0
    # A line may have been being written, or be none of ours.
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError), path.open("rb") as file:
        for line in file:
            row = json.loads(line)
            if {**row, **about, "batch": len(found)} != row or not line.endswith(b"\n"):
                break
            seen += len(line)
            batch.append(row["ids"])
            if len(batch) == row["of"]:
                found.append(batch)
                kept, batch = seen, []
    return found, kept


def _append(path: Path, kept: int, lines: bytes) -> int:
    """Write lines behind the bytes that are kept, and return how many bytes there are then."""
    with writing(path, "go on with --resume"), path.open("ab") as file:
        file.truncate(kept)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
    return kept + len(lines)
