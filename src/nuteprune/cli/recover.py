"""`nuteprune recover`: fine-tunes a pruned checkpoint, and merges what was learned into it."""

from __future__ import annotations

from typing import Any

from nuteprune.cli import options as o
from nuteprune.jobs.guard import check_free
from nuteprune.jobs.job import RecoverJob
from nuteprune.jobs.settings import make_job


@o.with_options(RecoverJob)
def recover(model: o.Model, out: o.Out, as_json: o.Json = False, **given: Any) -> None:
    """Fine-tune MODEL, a pruned checkpoint, on instructions or text.

    LoRA on all projections is trained and merged. The result is a checkpoint of the same shape and
    dtype, with its record kept.
    """
    job = make_job(RecoverJob, None, {"model": model, "out": out, **given})
    check_free(job)
    from nuteprune.console import Output
    from nuteprune.jobs.recover import finished

    output = Output(as_json)
    output.result(finished(job, output))
