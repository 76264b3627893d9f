"""`nuteprune vocab`: a checkpoint with a smaller vocabulary."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nuteprune.cli import options as o
from nuteprune.jobs.guard import check_free
from nuteprune.jobs.job import VocabJob
from nuteprune.jobs.settings import make_job


@o.with_options(VocabJob, but=VocabJob.NOT_HERE)
def vocab(
    model: o.Model,
    out: o.Out,
    keep: Annotated[
        str,
        typer.Option(
            help="Number of tokens to keep, such as 16384, or 'auto': the fewest that cost at most "
            "1 % on held-out DATA."
        ),
    ],
    as_json: o.Json = False,
    **given: Any,
) -> None:
    """Keep KEEP of MODEL's tokens: those that its texts need most.

    The 256 bytes are among them, so any text can still be spelled. Embedding and head are cut to
    these rows. The result is a stock checkpoint of the same class.
    """
    job = make_job(VocabJob, None, {"model": model, "out": out, **given})
    check_free(job, resumes=False)
    from nuteprune.console import Output
    from nuteprune.jobs.vocab import run

    output = Output(as_json)
    output.result(run(job, keep, output))
