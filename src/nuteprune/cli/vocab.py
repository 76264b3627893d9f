"""`nuteprune vocab`: a checkpoint with a smaller vocabulary."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nuteprune.cli import options as o
from nuteprune.console import Output
from nuteprune.jobs.job import make_job
from nuteprune.jobs.vocab import VocabJob, run

_NOT_HERE = ("eval_data", "device", "dtype", "resume")


@o.with_options(VocabJob, but=_NOT_HERE)
def vocab(
    model: o.Model,
    out: o.Out,
    keep: Annotated[int, typer.Option(help="Tokens that are to stay, such as 16384.")],
    as_json: o.Json = False,
    **given: Any,
) -> None:
    """Keep KEEP of MODEL's tokens: those that DATA needs most.

    All that spell any text are among them. Embedding and head are cut to these rows. The result is
    a stock checkpoint of the same class.
    """
    output = Output(as_json)
    job = make_job(VocabJob, None, {"model": model, "out": out, **given})
    output.result(run(job, keep, output))
