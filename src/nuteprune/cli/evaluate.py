"""`nuteprune eval`: how good a checkpoint is, dense, pruned or midway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nuteprune.cli import options as o
from nuteprune.judge import protocols


def evaluate(
    model: o.Model,
    against: Annotated[
        str | None,
        typer.Option(help="The dense model, to compare quality, answers and use of context with."),
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
        int | None,
        typer.Option(help="Tokens between starts of blocks; below --length they overlap."),
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
            help="Tasks of lm-evaluation-harness, comma separated; commonsense7 names seven."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most questions per task.")] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts that both models answer, JSON lines with 'prompt' or 'messages'; without "
            "it questions that the dense model writes, or beginnings of the text."
        ),
    ] = None,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Blocks or questions per forward pass.")] = 4,
    device: o.Device = None,
    dtype: o.Dtype = None,
    text_column: o.TextColumn = None,
    copying_seed: Annotated[
        int | None,
        typer.Option(help="Seed of the tokens to copy. Pass 0 to 9 while you choose a model."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Where the dense model of OUT/run/checkpoint-N is, if it was moved."),
    ] = None,
    family: o.Family = None,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Measure how good MODEL is: perplexity, copying, answers, tasks.

    Perplexity is measured on text, copying on random tokens. With --against also whether greedy
    answers loop, and what is lost on tokens that need their context. Tasks are zero-shot unless
    --fewshot says otherwise. MODEL may also be a trainer checkpoint, OUT/run/checkpoint-N. Without
    --data, --protocol and --tasks the text is the held-out part of the demo's.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from nuteprune.console import Output
    from nuteprune.jobs.evaluate import Evaluation, candidate_of, run
    from nuteprune.jobs.sources import use_family

    output = Output(given.pop("as_json"))
    use_family(given.pop("family", None), against or candidate_of(model, base).source)
    changes: dict[str, Any] = {
        x: given.pop(x) for x in ("length", "stride", "joining", "blocks") if x in given
    }
    output.result(run(Evaluation(**given, changes=changes), output))
