"""`nuteprune family`: an entry for a model type that is not listed, proposed and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuteprune.cli import options as o


def family(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder or config.json, or the name of a model type.")
    ],
    file: Annotated[
        Path | None, typer.Option("--family", help="Check this entry in place of proposing one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="YAML file to write the entry to.")] = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Propose an entry for a model type that is not listed.

    The entry is tried on a small model: the gates that hold with it are named.
    """
    from nuteprune.console import Output
    from nuteprune.jobs.family import run

    output = Output(as_json)
    output.result(run(model, output, file, out, overwrite))
