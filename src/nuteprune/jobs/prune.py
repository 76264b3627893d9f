"""The main job: a dense checkpoint in, a smaller checkpoint out. Shared by `prune` and `demo`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from nuteprune.console import Output, quiet_loading
from nuteprune.files import write_json
from nuteprune.jobs import guard
from nuteprune.jobs.folder import clear, clear_result, drop_aside, is_stated, share_run
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.prune_run import OWN_TEXT_SUM, make_run, trainer_config
from nuteprune.jobs.read_settings import check_target, make_job
from nuteprune.jobs.show import print_plan, print_report, print_result
from nuteprune.processes import is_main, several_started
from nuteprune.run import Run
from nuteprune.run_folder import RUN, SETTINGS
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.declared import check_same
from nuteprune.train.targets import check_reached


@dataclass
class Result:
    """What a job leaves.

    Args:
        records: folder -> record of each checkpoint, one per target, growing.
        plan: the plan of a dry run; None for other runs.
    """

    records: dict[Path, dict[str, Any]]
    plan: dict[str, Any] | None = None


def prune(
    model: str,
    *,
    out: str | os.PathLike[str],
    sparsity: float | Sequence[float] | None = None,
    data: str | Sequence[str] | None = None,
    steps: int | None = None,
    config: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any] | None:
    """Make a model smaller, as `nuteprune prune` does.

    Args:
        model: hub id, checkpoint folder, or `demo`.
        out: folder for the result.
        sparsity: share of the decoder layers' parameters to remove; several give a checkpoint each.
            Instead: `params="100M"`, `size="200MB"`, or `memory="4GiB@8192"`.
        data: calibration and training text: a file, a folder, a hub dataset, `demo`, or `self`
            (text that the model writes itself), or several. Half is `self` and the other half what
            is named, unless `self` is named too, or `shares` are given; `shares=1` takes one alone.
        steps: optimizer steps; 0 prunes without training.
        config: YAML file with settings.
        quiet: print nothing.
        **settings: the command's other options by name, such as `shape`, `method`, `device` or
            `dry_run`, and all of `NutePruneConfig`'s settings.

    Returns:
        The record (nuteprune.json) with the folder as `out`; of several targets {`targets`: list};
        of a dry run its plan. None in all processes of a run but the main one.

    Raises:
        UserError: for anything that cannot work; nothing is written then.
        RunFailed: if training breaks down or a target is missed.
    """
    given = {"model": model, "out": out, "data": data, "sparsity": sparsity, "steps": steps}
    job = make_job(PruneJob, {**given, **settings}, config)
    with quiet_loading():
        return run_and_report(job, Output(quiet=quiet))


def run_and_report(job: PruneJob, output: Output) -> dict[str, Any] | None:
    """Do the job, print what came out, and write its report; returns as `prune` does.

    Raises:
        UserError: if no target is given, or for what `run` refuses.
        RunFailed: if training breaks down or a target is missed.
    """
    check_target(job)
    result = run(job, output)
    if result is None:
        return None
    if result.plan is not None:
        return result.plan
    *_, last = result.records
    for folder, record in result.records.items():
        print_result(folder, record, output, answers=folder == last)
    finish(job, result.records, output)
    found = [{"out": str(folder), **record} for folder, record in result.records.items()]
    return found[0] if len(found) == 1 else {"targets": found}


def finish(job: PruneJob, records: dict[Path, dict[str, Any]], output: Output) -> None:
    """Measure the speed that was asked for, write the reports, and hold the result to it.

    Records get what is measured as `speedup`.

    Raises:
        RunFailed: if the result is too slow.
    """
    fast = {k: x for k, x in records.items() if x["asked"]["kind"] == "speedup"}
    if fast:
        from nuteprune.jobs.speed import check_speed, judge_speed  # few runs ask for it

        judge_speed(job, fast, output)
    for folder in records:
        print_report(folder, output)
    # Judged by text that the run did not read.
    output.line(f"Next    nuteprune eval {folder} --against {job.dense} --data YOUR_TEXT")
    for record in fast.values():
        check_speed(record)


def run(job: PruneJob, output: Output) -> Result | None:
    """Do the job; returns None in all processes of a run but the main one.

    Args:
        job: the job.
        output: prints.

    Raises:
        UserError: for anything in the job that cannot work; nothing is written then.
        RunFailed: if training breaks down or a target is missed.
    """
    # Trainer makes its folder at once, so a dry run gets one that nobody keeps.
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch) if job.dry_run else job.out
        if is_main() and not job.dry_run:
            stack.enter_context(guard.alone(job.out))
        if is_main():  # the others may come when it has begun to write
            guard.check_out(job)
        stack.enter_context(guard.nothing_left(folder))
        if job.resume and several_started():
            _ = trainer_config(job, Path(scratch) / RUN).device  # here processes meet
            share_run(job.out)
        steps_in_time = None
        if job.minutes is not None:
            from nuteprune.jobs.minutes import steps_in_time_of, within_minutes

            steps_in_time = steps_in_time_of(job)
        if job.vocab is not None:
            from nuteprune.jobs.fewer_first import fewer_tokens  # few runs ask for it

            stack.enter_context(fewer_tokens(job, Path(scratch), output))
        if job.minutes is not None:
            job = within_minutes(job, Path(scratch) / RUN, output)
        bars = stack.enter_context(output.bars())
        config = trainer_config(job, folder / RUN)
        made = make_run(job, config, bars)
        print_plan(job, made, output)
        if job.dry_run:
            from nuteprune.jobs.planned import print_dry_run

            plan = print_dry_run(job, made, output)
            return Result({}, plan) if is_main() else None
        begin(job, made)
        made.steps_in_time = steps_in_time
        # `nuteprune.pipeline`, or the one of `progressive.trainer`.
        records = import_module(config.PIPELINE).pipeline(made)
    if not is_main():
        return None
    if made.products.found:
        output.line(f"Resumed {', '.join(made.products.found)}: done before")
    for record in records.values():
        check_reached(record)
    return Result(records)


def begin(job: PruneJob, run: Run) -> None:
    """Make room in the job's folder, and write the settings of the run."""
    if job.resume:  # a process that went on would tell of the others' silence instead
        if is_stated(job):
            kinds = (PruneJob, NutePruneConfig)
            check_same(job.out / RUN, run.first.settings(), *kinds, also=("costs", OWN_TEXT_SUM))
        run.first.accelerator.wait_for_everyone()  # what is half written is of a killed run
        if is_main():
            clear_result(job.out, job.overwrite)
    elif is_main() and job.overwrite and job.vocab is None:
        clear(job.out)
    elif is_main() and job.overwrite:  # the vocabulary was cut into it
        drop_aside(job.out)
    if is_main():
        write_json(job.out / RUN / SETTINGS, run.first.settings())
    run.first.accelerator.wait_for_everyone()
