"""`nuteprune prune`: the whole method on any supported checkpoint."""

from __future__ import annotations

from typing import Any

from nuteprune.cli import options as o
from nuteprune.jobs.guard import check_free
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.settings import check_target, make_job
from nuteprune.train.prune_settings import PruneSettings


@o.with_options(PruneSettings, PruneJob)
def prune(
    model: o.Model,
    out: o.Out,
    config: o.Config = None,
    assignments: o.Set = None,
    as_json: o.Json = False,
    **given: Any,
) -> None:
    """Make MODEL smaller by SPARSITY, guided by text from DATA.

    --dry-run says first which shapes can be had, and what time and memory the run would take.
    """
    asked = {"model": model, "out": out, **given}
    job = make_job(PruneJob, PruneSettings, asked, config, assignments or ())
    check_target(job)
    check_free(job)
    from nuteprune.console import Output
    from nuteprune.jobs.prune import finished

    output = Output(as_json)
    result = finished(job, output)
    output.result(None if result is None else result.summary())
