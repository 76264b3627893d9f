"""`nuteprune plan`: what a run would take, from a config alone, and which settings make it fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nuteprune.cli import options as o
from nuteprune.errors import UserError
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.settings import make_job
from nuteprune.train.asked import value_of
from nuteprune.train.prune_settings import PruneSettings

_NOT_ASKED = (
    *("out", "data", "eval_data", "text_column", "shares", "trust_remote_code", "vocab"),
    *("device", "bits", "offload", "resume", "overwrite", "dry_run"),
)


@o.with_options(PruneSettings, PruneJob, but=_NOT_ASKED)
def plan(
    model: Annotated[
        str,
        typer.Argument(help="Hub id, folder with a config.json, config.json, or 'demo'."),
    ],
    devices: Annotated[int, typer.Option(help="Accelerators.")] = 1,
    device_memory: Annotated[
        str | None,
        typer.Option(help="Memory of each, such as 24GiB: plan lists settings that fit."),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="Speed in 10^12 operations a second. Default: measured here."),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            help="Memory speed in 10^9 bytes a second. Default: measured; with --tflops no limit."
        ),
    ] = None,
    config: o.Config = None,
    assignments: o.Set = None,
    as_json: o.Json = False,
    **given: Any,
) -> None:
    """Say what memory and time it would take to prune MODEL.

    Phase by phase, from the config alone: no weights are read.
    """
    if devices < 1 or not all(x is None or x > 0 for x in (tflops, bandwidth)):
        raise UserError("--devices, --tflops and --bandwidth must be above 0")
    if devices > 1 and device_memory is None:
        raise UserError(f"--devices {devices}: say what memory each has with --device-memory")
    asked = {"model": model, "out": Path("unused"), **given}
    job = make_job(PruneJob, PruneSettings, asked, config, assignments or ())
    memory = None
    if device_memory is not None:
        memory = value_of("memory", device_memory, "--device-memory")
    rate = None if tflops is None else tflops * 1e12
    reading = None if bandwidth is None else bandwidth * 1e9
    from nuteprune.console import Output
    from nuteprune.jobs.plan import Asked, run

    output = Output(as_json)
    output.result(run(job, Asked(devices, memory, rate, reading), output))
