"""For `--speedup`: measures the table of costs before a run, and the speed after it."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel

from nuteprune.console import Bars, Output
from nuteprune.data.tokens import check_positions
from nuteprune.errors import RunFailed, UserError
from nuteprune.files import cache_folder, write_json
from nuteprune.jobs.guard import check_writable
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.timing import Computing, measure, write_speed
from nuteprune.judge.bench import PASSES, hardware_of, say_ratio
from nuteprune.judge.block_times import cost_table
from nuteprune.judge.work import Workload
from nuteprune.model.anatomy import Anatomy
from nuteprune.processes import several_started
from nuteprune.run_folder import RUN, SPEED
from nuteprune.train.asked import moment
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.targets import read_table

MISSED = 0.95
"""A run fails if even its fastest pair of passes is below this share of the asked speed."""


def write_table(
    path: Path, model: PreTrainedModel, setting: Workload, how: Computing
) -> dict[str, Any]:
    """Measure what the blocks of a model cost, and write the table."""
    table = cost_table(model, setting, how.device, how.dtype)
    write_json(path, table)
    return table


def costs_for(
    job: PruneJob, config: NutePruneConfig, model: PreTrainedModel, bars: Bars
) -> dict[str, Any]:
    """Return the table of costs for a speed, measured once for each kind of model and machine.

    Args:
        job: the job.
        config: its trainer's settings.
        model: the dense model.
        bars: where progress is shown.

    Raises:
        UserError: if a table that is passed was measured at other work, if several processes would
            each measure a table of their own, or the model has too few positions for the tokens to
            time.
    """
    at = config.asked[0].about["at"]
    setting = Workload(*moment(at))
    longest = setting.length + setting.new_tokens
    check_positions(longest, model.config, f"the length of --speedup at {at}")
    if config.costs is not None:
        given = config.costs
        table = given if isinstance(given, dict) else read_table(given)
        _check_work(table, setting, at)
        return table
    if several_started():
        raise UserError(
            "a speedup in a run of several processes needs one table for all: measure it with "
            "nuteprune bench MODEL --save-costs FILE, and pass --costs FILE"
        )
    how, anatomy = Computing.asked(job.device, job.dtype), Anatomy(model)
    what = (
        platform.node(),  # CPUs do not say what they are
        *(torch.__version__, hardware_of(how.device), how.dtype, torch.get_num_threads(), at),
        *(anatomy.family.model_type, anatomy.head_dim, anatomy.shape),
        anatomy.embedding.weight.shape[0],
    )
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    path = cache_folder() / f"costs-{key}.json"
    if not path.is_file():  # a table that is there is read from a cache that cannot be written too
        check_writable("the table of costs", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):  # two runs would time each other
            if not path.is_file():
                bars.update("timing blocks", 0, 1)
                write_table(path, model, setting, how)
                bars.update("timing blocks", 1, 1)
    return read_table(str(path))


def _check_work(table: Mapping[str, Any], setting: Workload, at: str) -> None:
    """Refuse a table of other work than the speed is judged by."""
    for name, value in dataclasses.asdict(setting).items():
        if (measured := table.get(name, value)) != value:
            raise UserError(
                f"--costs was measured with {name.replace('_', ' ')} {measured}, and --speedup at "
                f"{at} has {value}: measure a table of that, or name the table's work after @"
            )


def measure_beside(
    job: PruneJob, folder: Path, setting: Workload, output: Output
) -> dict[str, Any]:
    """Measure a job's checkpoint beside the dense model, and keep what is found for its report."""
    how = Computing.asked(job.device, job.dtype)
    with output.bars() as bars:
        speed = measure([str(folder.absolute()), job.dense], [setting], PASSES, how, bars)
    write_speed(folder / RUN / SPEED, speed)
    return speed


def judge_speed(job: PruneJob, records: Mapping[Path, dict[str, Any]], output: Output) -> None:
    """Measure checkpoints with a target speed, as `bench` does, and add `speedup` to their records.

    Args:
        job: the job.
        records: folder -> record of each checkpoint that is to be fast.
        output: prints.
    """
    for folder, record in records.items():
        asked = record["asked"]
        speed = measure_beside(job, folder, Workload(*moment(asked["at"])), output)
        record["speedup"] = speed["settings"][0]["speedup"]
        ratio = record["speedup"][asked["for"]]
        output.line(
            f"Speed   {asked['for']} at {asked['at']}: {say_ratio(ratio)}; passes in pairs give "
            f"{ratio['low']:.2f} to {ratio['high']:.2f}, and {asked['value']:g} x was asked for"
        )


def check_speed(record: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is slower than was asked for.

    Raises:
        RunFailed: if the whole spread lies below `MISSED` times the target.
    """
    asked, ratio = record["asked"], record["speedup"][record["asked"]["for"]]
    if ratio["high"] < MISSED * asked["value"]:
        raise RunFailed(
            f"the target was missed: {asked['for']} is {ratio['low']:.2f} to {ratio['high']:.2f} x "
            f"as fast, and {asked['value']:g} x was asked for; the checkpoint is written all the "
            "same"
        )
