"""`nuteprune write`: text that a model writes itself, as a run of `prune` lets it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuteprune.cli import options as o
from nuteprune.jobs.job import Job
from nuteprune.train.prune_settings import PruneSettings


def write(
    model: o.Model,
    tokens: Annotated[int, typer.Option(help="Tokens to write, at least.")],
    out: Annotated[Path, typer.Option(help="File for the text, such as own.jsonl.")],
    length: o.Length = Job.length,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = PruneSettings.seed,
    device: o.Device = None,
    dtype: o.Dtype = None,
    overwrite: o.Overwrite = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Let MODEL write text of its own, for prune --own-text.

    After a stop, the same command goes on with the written part.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from nuteprune.console import Output
    from nuteprune.jobs.write import Asked, run

    output = Output(given.pop("as_json"))
    output.result(run(Asked(**given), output))
