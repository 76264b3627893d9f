"""`nuteprune demo`: the main job on the model and text that registry packages carry."""

from __future__ import annotations

from typing import Any

from nuteprune.cli import options as o
from nuteprune.data.specs import DEMO
from nuteprune.jobs.guard import DEMOS, begun_folder, check_free, free_folder
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.settings import make_job
from nuteprune.train.prune_settings import PruneSettings


@o.with_options(
    PruneSettings,
    PruneJob,
    but=("data", "eval_data", "text_column", "trust_remote_code", "family"),
)
def demo(
    out: o.OptionalOut = None,
    config: o.Config = None,
    assignments: o.Set = None,
    as_json: o.Json = False,
    **given: Any,
) -> None:
    """Prune SmolLM2-135M-Instruct on real text; no arguments needed.

    Without --out the result is in ./nuteprune-demo, or -2, -3, ... where that is taken;
    with --overwrite always in ./nuteprune-demo.
    """
    pick = begun_folder if given["resume"] else free_folder
    folder = DEMOS if given["overwrite"] else pick(DEMOS)
    asked = {"model": DEMO, "out": folder if out is None else out, **given}
    job = make_job(PruneJob, PruneSettings, asked, config, assignments or ())
    check_free(job)
    from nuteprune.console import Output
    from nuteprune.jobs.demo import fetch, finished

    output = Output(as_json)
    fetch(output)
    output.result(finished(job, output))
