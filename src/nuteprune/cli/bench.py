"""`nuteprune bench`: speed and memory of a checkpoint, next to the dense model."""

from __future__ import annotations

from typing import Any

from nuteprune.cli import options as o
from nuteprune.jobs.options import Benchmark


@o.with_options(Benchmark, defaults=True)
def bench(model: o.Model, as_json: o.Json = False, **given: Any) -> None:
    """Measure how fast MODEL reads and writes, and its memory.

    Prompts are random tokens. Each model has a process of its own; with --against they take turns,
    so that other work of the machine slows both alike.
    """
    asked = Benchmark(model, **o.given(given))
    from nuteprune.console import Output
    from nuteprune.jobs.bench import run

    output = Output(as_json)
    output.result(run(asked, output))
