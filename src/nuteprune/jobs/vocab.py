"""The job of `vocab`: a checkpoint with fewer tokens, those that a text needs most."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.console import Output, megabytes, millions, quiet_loading
from nuteprune.data.fingerprint import Fingerprint
from nuteprune.data.specs import iter_documents
from nuteprune.data.tokens import check_positions
from nuteprune.errors import UserError
from nuteprune.export.checkpoint import as_stored
from nuteprune.export.gguf.splits import PROBES
from nuteprune.export.record import write_pruned
from nuteprune.export.vocabulary import (
    check_spelling,
    cut_model,
    cut_tokenizer_of,
    merges_of,
    template_tokens,
)
from nuteprune.gates.budget import Budget
from nuteprune.jobs.folder import alone, check_out, clear
from nuteprune.jobs.job import Job, VocabJob
from nuteprune.jobs.settings import make_job
from nuteprune.jobs.sources import around, load_model, load_tokenizer, origin, stored_dtype
from nuteprune.model.anatomy import Anatomy
from nuteprune.run import in_percent
from nuteprune.run_folder import SELF
from nuteprune.shrink.vocabulary import Merges, choose, tokens_in
from nuteprune.stages.write import write

MOST_CHARACTERS = 50_000_000
"""Text that tokens are counted in; of more the rest is left aside."""
SELF_TOKENS = 50_000
"""Tokens that the model writes where it is its own text that is counted."""
TOGETHER = 1_000_000
"""Characters that are tokenized at a time, about."""


def vocab(
    model: str,
    *,
    out: str | os.PathLike[str],
    keep: int,
    data: str | Sequence[str] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Make a model's vocabulary smaller, as `nuteprune vocab` does.

    Args:
        model: hub id, checkpoint folder, or `demo`.
        out: folder for the result, a stock checkpoint of the same class.
        keep: tokens that are to stay.
        data: text that tells which: a file, a folder, a hub dataset, `demo`, or `self`.
        quiet: print nothing.
        **settings: the command's other options by name.

    Returns:
        The record (nuteprune.json) with the folder as `out`.

    Raises:
        UserError: for anything that cannot work; nothing is written then.
        RunFailed: if the tokenizer that is left does not spell what the full one does.
    """
    if foreign := [x for x in VocabJob.NOT_HERE if settings.get(x) is not None]:
        raise UserError(f"setting {foreign[0]} has no use in vocab: leave it out")
    job = make_job(VocabJob, None, {"model": model, "out": out, "data": data, **settings})
    with quiet_loading():
        return run(job, keep, Output(quiet=quiet))


def run(job: Job, keep: int, output: Output) -> dict[str, Any]:
    """Count, choose, cut and write; returns the record with the folder as `out`.

    Args:
        job: model, data and folder.
        keep: tokens that are to stay.
        output: where it is told.

    Raises:
        UserError: for anything that cannot work; nothing is written then.
        RunFailed: if the tokenizer that is left does not spell what the full one does.
    """
    started = time.monotonic()
    with alone(job.out):
        check_out(job, resumes=False)
        if around(job.model) is not None:
            raise UserError(
                f"{job.model} is a model of several modalities, whose processor has tokens of its "
                "own: nuteprune prune --set text_only=true writes its language model, which can "
                "be cut"
            )
        tokenizer = load_tokenizer(job.model, job.trust_remote_code)
        merges_of(tokenizer)  # refuses what cannot be cut, before weights are read
        model = load_model(job.model, torch.bfloat16, exact=True)
        anatomy = Anatomy(model)
        merges = merges_of(tokenizer, anatomy.embedding.weight.shape[0])
        _check_rows(job, merges, anatomy)
        counted, known = _count(job, model, tokenizer, output)
        kept = _chosen(anatomy, tokenizer, merges, counted, keep)
        small = cut_model(anatomy, kept)
        smaller = cut_tokenizer_of(tokenizer, merges, kept, model.config.model_type)
        check_spelling(tokenizer, smaller, PROBES)
        if job.overwrite:
            clear(job.out)
        record = write_pruned(
            job.out,
            as_stored(small, stored_dtype(model)),
            smaller,
            {"before": anatomy.parameters(), "blocks_before": Budget.of(anatomy).before},
            **_unpruned(anatomy, keep),
            **origin(job.model),
            vocab=_vocab(anatomy, kept, counted),
            config=_asked(job, keep),
            text=known.to_dict(),
            seconds=round(time.monotonic() - started, 1),
        )
    _print(job, record, output)
    return {"out": str(job.out), **record}


def _asked(job: Job, keep: int) -> dict[str, Any]:
    """Return the settings that reproduce the run."""
    column = {"text_column": job.text_column} if job.text_column is not None else {}
    length = {"length": job.length} if SELF in job.specs else {}
    return {"model": job.model, "data": job.specs, "keep": keep, **column, **length}


def _check_rows(job: Job, merges: Merges, anatomy: Anatomy) -> None:
    rows = anatomy.embedding.weight.shape[0]
    if max(merges.all_ids.values()) >= rows:
        raise UserError(
            f"the tokenizer of {job.model} has tokens up to number "
            f"{max(merges.all_ids.values())}, the embedding only {rows} rows: it belongs to "
            "another checkpoint"
        )


def _chosen(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    merges: Merges,
    counted: Counter[int],
    keep: int,
) -> list[int]:
    """Return the ids that stay, growing."""
    needed = template_tokens(tokenizer) | tokens_in(anatomy.config.to_dict())
    needed |= tokens_in(anatomy.model.generation_config.to_dict())
    return choose(merges, [i for i, _ in counted.most_common()], keep, needed)


def _count(
    job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Output
) -> tuple[Counter[int], Fingerprint]:
    """Return how often each token is used in the text, and what the text is known by."""
    counted: Counter[int] = Counter()
    known = Fingerprint()
    with output.bars() as bars:
        for spec in job.specs:
            if spec == SELF:
                check_positions(job.length, model.config)
                with tempfile.TemporaryDirectory() as scratch:
                    written = write(
                        model,
                        tokenizer,
                        tokens=SELF_TOKENS,
                        length=job.length,
                        seed=0,
                        folder=Path(scratch),
                        progress=in_percent(bars.update),
                    )
                counted.update(i for ids in written for i in ids)
                continue
            for name, documents in iter_documents(
                spec, text_column=job.text_column, tokenizer=tokenizer
            ).items():
                read = 0
                for texts in parts(documents):
                    for ids in tokenizer(texts, add_special_tokens=False).input_ids:
                        counted.update(ids)
                    read += sum(map(len, texts))
                    bars.update(f"counting {name}", read, MOST_CHARACTERS)
                known.update(documents.fingerprint)
    return counted, known


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


def _unpruned(anatomy: Anatomy, keep: int) -> dict[str, Any]:
    """Return what the record says of layers, of which nothing goes."""
    shape = anatomy.shape
    return {
        "target": 0.0,
        "asked": {"kind": "vocab", "value": keep},
        "before": shape,
        "after": shape,
        "shapes": "uniform" if shape.uniform else "free",
        "teachers": {"count": 0, "sparsities": []},
        "perplexity": {"before": {}, "after": {}},
        "bad_steps": 0,
        "seed": 0,
    }


def _vocab(anatomy: Anatomy, kept: list[int], counted: Counter[int]) -> dict[str, Any]:
    used = max(1, counted.total())
    return {
        "before": anatomy.embedding.weight.shape[0],
        "after": len(kept),
        "covered": sum(counted[i] for i in kept) / used,
    }


def _print(job: Job, record: Mapping[str, Any], output: Output) -> None:
    vocab, params = record["vocab"], record["params"]
    output.table(
        f"{job.model}: {vocab['after']} of {vocab['before']} tokens",
        ["", "before", "after"],
        [
            ["tokens", str(vocab["before"]), str(vocab["after"])],
            ["parameters", millions(params["before"]), millions(params["after"])],
        ],
    )
    output.line(
        f"{vocab['covered']:.2%} of the text's tokens stay whole; "
        f"{record['total_sparsity']:.2%} of all parameters are gone; "
        f"{megabytes(record['bytes_on_disk'])} on disk"
    )
    output.line(f"Saved   {job.out}")
