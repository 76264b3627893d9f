"""The job of `vocab`: a checkpoint with fewer tokens, those that a text needs most."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.console import Output, megabytes, millions, quiet_loading
from nuteprune.errors import UserError
from nuteprune.export.vocabulary import merges_of, template_tokens
from nuteprune.gates.budget import Budget
from nuteprune.jobs.fewer_tokens import Cutter, Smaller, VocabText, costs, read_text
from nuteprune.jobs.folder import clear
from nuteprune.jobs.guard import alone, check_out
from nuteprune.jobs.job import Job, VocabJob, tokens_asked
from nuteprune.jobs.read_settings import make_job
from nuteprune.jobs.sources import around, load_model, load_tokenizer, origin, stored_dtype
from nuteprune.model.anatomy import Anatomy
from nuteprune.products import Products
from nuteprune.run_folder import VOCAB
from nuteprune.shrink.token_ids import tokens_in, unknown_ids
from nuteprune.shrink.token_use import expected_use, use_of
from nuteprune.shrink.vocabulary import Merges, choose
from nuteprune.stages.save import save
from nuteprune.stages.slice import Sliced
from nuteprune.stages.write import OWN_SHARE


def vocab(
    model: str,
    *,
    out: str | os.PathLike[str],
    keep: int | str,
    data: str | Sequence[str] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Make a model's vocabulary smaller, as `nuteprune vocab` does.

    Args:
        model: hub id, checkpoint folder, or `demo`.
        out: folder for the result, a stock checkpoint of the same class.
        keep: tokens that are to stay, or `auto`: see `Cutter.fewest`.
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
    job = make_job(VocabJob, {"model": model, "out": out, "data": data, **settings})
    with quiet_loading():
        return run(job, keep, Output(quiet=quiet))


def run(job: Job, keep: int | str, output: Output) -> dict[str, Any]:
    """Count, choose, cut and write; returns the record with the folder as `out`.

    Args:
        job: model, data and folder.
        keep: tokens that are to stay, or `auto`.
        output: prints.

    Raises:
        UserError: for anything that cannot work; nothing is written then.
        RunFailed: if the tokenizer that is left does not spell what the full one does.
    """
    keep = tokens_asked(keep, "--keep")
    with alone(job.out):
        check_out(job)
        check_whole(job.model)
        make_room = partial(clear, job.out) if job.overwrite else None
        record = cut(job, keep, job.out, output, make_room)
    _print(job, record, output)
    return {"out": str(job.out), **record}


def check_whole(model: str) -> None:
    """Refuse a model of several modalities.

    Raises:
        UserError: saying how to have its language model.
    """
    if around(model) is not None:
        raise UserError(
            f"{model} is a model of several modalities, whose processor has tokens of its own: "
            "nuteprune prune --set text_only=true writes its language model, which can be cut"
        )


def cut(
    job: Job,
    keep: int | str,
    folder: Path,
    output: Output,
    make_room: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Count, choose, cut and write a checkpoint with fewer tokens; returns its record.

    Args:
        job: model and data.
        keep: tokens that are to stay, or `AUTO`.
        folder: where the checkpoint goes.
        output: prints.
        make_room: called before the checkpoint is written.

    Raises:
        UserError: for anything that cannot work; nothing is written then.
        RunFailed: if the tokenizer that is left does not spell what the full one does.
    """
    products = Products(None, {})
    started = time.monotonic()
    with products.measured(VOCAB):
        cutter, small, text = _chosen(job, keep, output)
    anatomy, kept = cutter.anatomy, len(small.kept)
    shape = anatomy.shape
    if make_room is not None:
        make_room()
    return save(
        Sliced(small.model, shape),  # all layers stay whole
        folder,
        small.tokenizer,
        budget=Budget.of(anatomy),
        parameters={"before": anatomy.parameters()},
        stored_dtype=stored_dtype(anatomy.model),
        target=0.0,
        asked={"kind": "vocab", "value": kept},
        shapes="uniform" if shape.uniform else "free",
        teachers={"count": 0, "sparsities": []},
        bad_steps=0,
        seed=0,
        **origin(job.model),
        vocab={
            "before": anatomy.embedding.weight.shape[0],
            "after": kept,
            "covered": sum(text.counted[i] for i in small.kept) / max(1, text.counted.total()),
            "bits_per_character": {"before": dict(cutter.bits), "after": dict(small.bits)},
        },
        config=asked_for(job, keep),
        text=text.known.to_dict(),
        stages=products.costs,
        seconds=round(time.monotonic() - started, 1),
    )


def _chosen(job: Job, keep: int | str, output: Output) -> tuple[Cutter, Smaller, VocabText]:
    """Return the model with its text, and what is left of it; errors as of `cut`."""
    tokenizer = load_tokenizer(job.model, job.trust_remote_code)
    merges_of(tokenizer)  # refuses what cannot be cut, before weights are read
    model = load_model(job.model, torch.bfloat16, exact=True)
    anatomy = Anatomy(model)
    rows = anatomy.embedding.weight.shape[0]
    merges = merges_of(tokenizer, rows)
    if (last := max(merges.all_ids.values())) >= rows:
        raise UserError(
            f"the tokenizer of {job.model} has tokens up to number {last}, the embedding only "
            f"{rows} rows: it belongs to another checkpoint"
        )
    _tell_unknown(anatomy, output)
    needed = _needed(anatomy, tokenizer)
    if isinstance(keep, int):  # refused before text is written, if it cannot be
        choose(merges, (), keep, needed)
    positions = getattr(model.config, "max_position_embeddings", job.length)
    text = read_text(job, min(job.length, positions), anatomy, tokenizer, output)
    used = _used(anatomy, merges, text)
    cutter = Cutter(anatomy, tokenizer, merges, needed, used, text.held_out)

    def tell(tried: Smaller) -> None:
        output.line(f"Tried   {len(tried.kept)} tokens: {costs(cutter.bits, tried.bits)}")

    return cutter, cutter.cut(keep) if isinstance(keep, int) else cutter.fewest(tell), text


def with_fewer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keep: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer with as many tokens, whichever they are.

    Raises:
        UserError: if it cannot be.
    """
    anatomy = Anatomy(model)
    merges = merges_of(tokenizer, anatomy.embedding.weight.shape[0])
    small = Cutter(anatomy, tokenizer, merges, _needed(anatomy, tokenizer), (), {}).cut(keep)
    return small.model, small.tokenizer


def asked_for(job: Job, keep: int | str) -> dict[str, Any]:
    """Return the settings that reproduce a smaller vocabulary."""
    column = {"text_column": job.text_column} if job.text_column is not None else {}
    length = {"length": job.length} if job.length != VocabJob.length else {}
    return {"model": job.model, "data": job.specs, "keep": keep, **column, **length}


def _needed(anatomy: Anatomy, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that the chat template and settings name."""
    needed = template_tokens(tokenizer) | tokens_in(anatomy.config.to_dict())
    return needed | tokens_in(anatomy.model.generation_config.to_dict())


def _tell_unknown(anatomy: Anatomy, output: Output) -> None:
    """Print the settings that may hold token ids, which cannot be renumbered."""
    rows = anatomy.embedding.weight.shape[0]
    config, generation = anatomy.model.config, anatomy.model.generation_config
    for name, found in (("config.json", config), ("generation_config.json", generation)):
        known = type(found)().to_dict().keys() | getattr(found, "attribute_map", {}).keys()
        for key in unknown_ids(found.to_dict(), known, rows):
            output.line(
                f"Note    {key} in {name} is none of transformers' settings and stays as it is: "
                "if its numbers are token ids, count them anew"
            )


def _used(anatomy: Anatomy, merges: Merges, text: VocabText) -> list[float]:
    """Return how often each token will be used, by id."""
    expected_V, flat_V = expected_use(anatomy, text.windows.texts, text.start)
    _, own_V = expected_use(anatomy, text.own, text.start)
    counted_V = torch.tensor([float(text.counted[i]) for i in range(len(flat_V))])
    return use_of(merges, counted_V, expected_V, flat_V + own_V, OWN_SHARE)


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
    bits = vocab["bits_per_character"]
    output.line(f"On held-out text, {costs(bits['before'], bits['after'])}")
    output.line(
        f"{vocab['covered']:.2%} of the text's tokens stay whole; "
        f"{record['total_sparsity']:.2%} of all parameters are gone; "
        f"{megabytes(record['bytes_on_disk'])} on disk"
    )
    output.line(f"Saved   {job.out}")
