"""`nuteprune write`: text that a model writes itself, as a run of `prune` lets it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nuteprune.cli import options as o
from nuteprune.jobs.options import Writing


@o.with_options(Writing, defaults=True)
def write(
    model: o.Model,
    tokens: Annotated[int, typer.Option(help="Tokens to write, at least.")],
    out: Annotated[Path, typer.Option(help="File for the text, such as own.jsonl.")],
    as_json: o.Json = False,
    **given: Any,
) -> None:
    """Let MODEL write text of its own, for prune --own-text.

    After a stop, the same command goes on with the written part.
    """
    asked = Writing(model, tokens, out, **o.given(given))
    from nuteprune.console import Output
    from nuteprune.jobs.write import run

    output = Output(as_json)
    output.result(run(asked, output))
