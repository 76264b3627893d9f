"""`nuteprune eval`: perplexity, copying and tasks of a checkpoint, dense, pruned or midway."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedTokenizerBase

from nuteprune.cli import options as o
from nuteprune.console import Output
from nuteprune.data.specs import DEMO
from nuteprune.data.tokens import check_ids, check_positions
from nuteprune.errors import UserError
from nuteprune.jobs.comparison import same_tokens
from nuteprune.jobs.midway import Judged, judged
from nuteprune.jobs.sources import load_tokenizer, pick_device, pick_dtype, record_of
from nuteprune.judge import protocols, texts
from nuteprune.judge.copying import SEED as COPYING_SEED
from nuteprune.judge.copying import copying
from nuteprune.judge.perplexity import perplexity
from nuteprune.judge.provenance import calibrated_on, kind_of
from nuteprune.judge.tasks import Tasks
from nuteprune.judge.verdicts import Verdicts
from nuteprune.model.anatomy import Anatomy
from nuteprune.train.run_settings import read_settings


def evaluate(
    model: o.Model,
    against: Annotated[
        str | None, typer.Option(help="The dense model: adds what is retained of it, in percent.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Text, may be repeated: {', '.join(protocols.TEXTS)} (from the hub; NAME=FILE "
            "reads a local copy), a file, a folder, a hub dataset id[:config[:split]], or 'demo'."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help=f"How text is cut into blocks: {', '.join(protocols.PROTOCOLS)}."),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per block.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from block to block; less than the length: overlap.")
    ] = None,
    joining: Annotated[
        str | None, typer.Option(help=f"Between documents: {', '.join(protocols.JOININGS)}.")
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="Most blocks per text; 0: all.")] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="All of the text, not only its held-out part.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, comma separated; commonsense7: seven at once."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most questions per task.")] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks or questions per forward pass.")] = 4,
    device: o.Device = None,
    dtype: o.Dtype = None,
    text_column: o.TextColumn = None,
    copying_seed: Annotated[
        int,
        typer.Option(help="Draws the tokens to copy. To choose between models pass one of 0 to 9."),
    ] = COPYING_SEED,
    base: Annotated[
        str | None,
        typer.Option(help="Where the model is now that OUT/run/checkpoint-N prunes."),
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Measure how good MODEL is: perplexity on text, copying from context, zero-shot tasks.

    MODEL may also be a trainer checkpoint, OUT/run/checkpoint-N. Without --data and --tasks,
    perplexity on the held-out part of the embedded texts is measured.
    """
    output = Output(as_json)
    _check(batch_size, tasks, {"include-path": include_path, "limit": limit, "fewshot": fewshot})
    models = [judged(name, base) for name in (model, against) if name is not None]
    questions = None
    if tasks is not None:
        names = [x.strip() for x in tasks.split(",") if x.strip()]
        questions = Tasks(names, include_path, limit, fewshot)
    kind = pick_device(device or "auto")
    computed = pick_dtype(dtype or "auto", kind)
    tokenizer = load_tokenizer(models[0].source, trust_remote_code)
    cut: dict[str, texts.Blocks] = {}
    if data or protocol or questions is None:
        changes = {"length": length, "stride": stride, "joining": joining, "blocks": blocks}
        calibrated = _calibrated(models)
        cut = _blocks(data, protocol, changes, tokenizer, whole, text_column, calibrated)
        if against is not None:
            same_tokens(tokenizer, models[1].source, trust_remote_code)
    verdicts = Verdicts(cut, questions)
    with output.bars() as bars:
        for i, one in enumerate(models):
            bars.update("models", i, len(models), one.name)
            loaded, sparsity = one.load(computed, kind)
            verdicts.midway |= {one.name: sparsity} if sparsity is not None else {}
            if cut:
                verdicts.perplexity[one.name] = _measure(one, loaded, cut, batch_size, bars.update)
            own = load_tokenizer(one.source, trust_remote_code)
            verdicts.copying[one.name] = copying(
                loaded, own, seed=copying_seed, batch_size=batch_size
            )
            if questions is not None:
                verdicts.tasks[one.name] = questions.ask(loaded, own, batch_size)
            del loaded
            gc.collect()
        bars.update("models", len(models), len(models))
    if against is not None:
        verdicts.compare(model, against)
    verdicts.print(output)
    stated = {"device": kind, "dtype": str(computed).removeprefix("torch.")}
    output.result({"model": model, "against": against, **stated, **verdicts.to_dict()})


def _check(batch_size: int, tasks: str | None, for_tasks: Mapping[str, object]) -> None:
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: pass at least 1")
    for name, value in for_tasks.items():
        if value is not None and tasks is None:
            raise UserError(f"--{name} is for tasks; name some with --tasks")


def _calibrated(models: Sequence[Judged]) -> list[str] | None:
    """Return the texts that the models were calibrated on; None if no record tells."""
    records = [record for x in models if (record := record_of(x.source)) is not None]
    runs = [x.checkpoint.parent for x in models if x.checkpoint is not None]
    records += [{"config": read_settings(run)} for run in runs]
    return [spec for x in records for spec in calibrated_on(x)] if records else None


def _blocks(
    data: list[str] | None,
    protocol: str | None,
    changes: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    whole: bool,
    text_column: str | None,
    calibrated: Sequence[str] | None,
) -> dict[str, texts.Blocks]:
    """Cut each text by the protocol that was asked for, or by the one that suits it."""
    named = protocols.protocol_named(protocol) if protocol else None
    specs = data or (list(named.texts) if named else [DEMO])
    cut = {}
    for spec in specs:
        published = spec.partition("=")[0] in protocols.TEXTS
        name = protocol or ("nuteprune" if published else protocols.HELD_OUT)
        how = protocols.changed(protocols.protocol_named(name), **changes)
        kind = None if calibrated is None else kind_of(spec, calibrated)
        found = texts.rows_of(spec, whole=whole, text_column=text_column, tokenizer=tokenizer)
        for source, read in found.items():
            if source in cut:
                raise UserError(
                    f"two texts are called {source}: name each only once, or rename a file"
                )
            made = texts.make_blocks(source, read(), tokenizer, how)
            part = "all" if whole or published else "held-out"
            described = {"kind": kind, "protocol": name, "part": part, **made.described}
            cut[source] = dataclasses.replace(made, described=described)
    return cut


def _measure(
    one: Judged, loaded: Any, cut: Mapping[str, texts.Blocks], batch_size: int, update: Any
) -> dict[str, float]:
    vocabulary = Anatomy(loaded).embedding.weight.shape[0]
    found = {}
    for i, (source, blocks) in enumerate(cut.items()):
        update(f"perplexity, {one.name}", i, len(cut), source)
        check_ids(blocks.tokens_NT, vocabulary)
        check_positions(blocks.tokens_NT.shape[1], loaded.config)
        found[source] = perplexity(
            loaded, blocks.tokens_NT, batch_size=batch_size, context=blocks.context_N
        )
    update(f"perplexity, {one.name}", len(cut), len(cut))
    return found
