"""`nuteprune inspect`: what a pruned checkpoint is made of, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuteprune.cli import options as o


def inspect(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that nuteprune wrote.")],
    as_json: o.Json = False,
) -> None:
    """Show the layers, parameters and quality of a pruned checkpoint."""
    from nuteprune.console import Output
    from nuteprune.jobs.inspect import run

    output = Output(as_json)
    output.result(run(folder, output))
