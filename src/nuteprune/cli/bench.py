"""`nuteprune bench`: speed and memory of a checkpoint, next to the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuteprune.cli import options as o
from nuteprune.run_folder import RUN, SPEED


def bench(
    model: o.Model,
    against: Annotated[str | None, typer.Option(help="The dense model, timed in turns.")] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="What runs the models: transformers, or llama.cpp, which reads GGUF files that "
            "bench exports in --dtype float16, bfloat16 or float32."
        ),
    ] = "transformers",
    batch_sizes: Annotated[str, typer.Option(help="Sequences at a time, with commas.")] = "1,4",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompt, with commas.")] = "256",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after the prompt.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timed passes, after one to warm up.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads on a CPU.")] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    save: Annotated[
        bool, typer.Option("--save", help=f"Also write MODEL/{RUN}/{SPEED} for the report.")
    ] = False,
    save_costs: Annotated[
        Path | None,
        typer.Option(
            help="Only time MODEL's blocks and write this file, for prune --speedup. Of "
            "--batch-sizes and --lengths the first counts; --repeats is ignored."
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    family: o.Family = None,
    as_json: o.Json = False,
) -> None:
    """Measure how fast MODEL reads and writes, and its memory.

    Prompts are random tokens. Each model has a process of its own; with --against they take turns,
    so that other work of the machine slows both alike.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from nuteprune.console import Output
    from nuteprune.jobs.bench import run

    output = Output(given.pop("as_json"))
    output.result(run(output=output, **given))
