"""The main job: a dense checkpoint in, a smaller checkpoint out. Shared by `prune` and `demo`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.console import Bars, Output, quiet_loading
from nuteprune.errors import UserError
from nuteprune.export.loading import in_dtype
from nuteprune.jobs.dry_run import print_dry_run
from nuteprune.jobs.family import take
from nuteprune.jobs.folder import clear, clear_result, goes_on, is_stated, target_folder
from nuteprune.jobs.guard import alone, check_out, nothing_left
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.judging import Judge
from nuteprune.jobs.prune_trainer import (
    check_priced,
    check_wrapper,
    make_trainer,
    outside,
    trainer_config,
)
from nuteprune.jobs.settings import make_job
from nuteprune.jobs.show import print_plan, print_report, print_results
from nuteprune.jobs.sources import load_model, load_tokenizer, origin, pick_dtype
from nuteprune.jobs.speed import check_speed, costs_for, judge_speed
from nuteprune.jobs.text import JobText, mixture
from nuteprune.judge.run_files import write_extra
from nuteprune.judge.samples import side_by_side
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.offload import bring_home
from nuteprune.processes import is_main
from nuteprune.run_folder import RUN, SAMPLES, SELF_WRITTEN
from nuteprune.train.asked import SETTINGS
from nuteprune.train.checks import check_offload
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.prepare import offload_if_asked
from nuteprune.train.run_settings import check_same, chosen_settings
from nuteprune.train.settings import check_declared
from nuteprune.train.targets import check_reached
from nuteprune.train.trainer import NutePruneTrainer


@dataclass
class Result:
    """What a job leaves.

    Args:
        records: folder -> record of each checkpoint, one per target, growing.
        held_out: the text that they were judged by, source -> (N, T).
        scores: the units' scores before training, kind -> (N,).
        plan: what a dry run found, None of any other.
        speedups: folder -> what was measured, where speed was asked for.
    """

    records: dict[Path, dict[str, Any]]
    held_out: Mapping[str, Tensor]
    scores: dict[str, Tensor]
    plan: dict[str, Any] | None = None
    speedups: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return the record, with the folder as `out`; of several targets a list in `targets`."""
        if self.plan is not None:
            return self.plan
        lines = [{"out": str(folder), **record} for folder, record in self.records.items()]
        for line, folder in zip(lines, self.records, strict=True):
            line |= {"speedup": self.speedups[folder]} if folder in self.speedups else {}
        return lines[0] if len(lines) == 1 else {"targets": lines}


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
            Instead: `params="100M"`, `size="200MB"`, or `memory="4GiB"` with `context=8192`.
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
        of a dry run what it found. None in all processes of a run but the main one.

    Raises:
        UserError: for anything that cannot work; nothing is written then.
        RunFailed: if training breaks down or a target is missed.
    """
    given = {"model": model, "out": out, "data": data, "sparsity": sparsity, "steps": steps}
    job = make_job(PruneJob, NutePruneConfig, {**given, **settings}, config)
    with quiet_loading():
        result = finished(job, Output(quiet=quiet))
    return None if result is None else result.summary()


def finished(job: PruneJob, output: Output) -> Result | None:
    """Do the job, print what came out, and write its report; see `run`.

    Raises:
        UserError: if no target is given, or for what `run` refuses.
        RunFailed: if training breaks down or a target is missed.
    """
    if not SETTINGS.keys() & job.settings.keys():
        raise UserError(
            "no target given: pass --sparsity, such as --sparsity 0.2, or one of "
            f"{', '.join(option for option in SETTINGS.values() if option != '--sparsity')}"
        )
    result = run(job, output)
    if result is not None and result.plan is None:
        print_results(result.records, output)
        tell(job, result, output)
    return result


def tell(job: PruneJob, result: Result, output: Output) -> None:
    """Measure the speed that was asked for, write the report, and hold the result to it.

    Raises:
        RunFailed: if it is too slow.
    """
    result.speedups = judge_speed(job, result.records, output)
    print_report(job, output)
    for folder, speedup in result.speedups.items():
        check_speed(result.records[folder], speedup)


def run(job: PruneJob, output: Output) -> Result | None:
    """Do the job; returns None in all processes of a run but the main one.

    Raises:
        UserError: for anything in the job that cannot work; nothing is written then.
        RunFailed: if training breaks down or a target is missed.
    """
    started = time.monotonic()
    check_declared(job)
    # Trainer makes its folder at once, so a dry run gets one that nobody keeps.
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch) if job.dry_run else job.out
        if is_main() and not job.dry_run:
            stack.enter_context(alone(job.out))
        if is_main():  # the others may come when it has begun to write
            check_out(job)
        with nothing_left(folder):
            return _run(job, trainer_config(job, folder / RUN), output, started)


def _run(job: PruneJob, config: NutePruneConfig, output: Output, started: float) -> Result | None:
    check_offload(config, packed=job.bits is not None)
    take(job.family, job.model)
    check_priced(job, config)
    tokenizer = load_tokenizer(job.model, job.trust_remote_code)
    dtype = pick_dtype(job.dtype, job.device)
    model = load_model(job.model, dtype, job.bits, str(config.device))
    text = JobText(job, config, tokenizer, Anatomy(model))
    held_out = text.held_out()
    with output.bars() as bars:
        config.costs = costs_for(job, config, model, bars)
        trainer = make_trainer(job, model, config, text.training, tokenizer, bars)
        check_wrapper(job, trainer)
        print_plan(job, trainer, output)
        if job.dry_run:
            judged = sum(map(len, held_out.values()))
            plan = print_dry_run(job, trainer, text.seconds_to_write(trainer), judged, output)
            return Result({}, held_out, {}, plan) if is_main() else None
        if is_stated(job):  # a process that went on would tell of the others' silence instead
            kinds = (PruneJob, NutePruneConfig)
            check_same(job.out / RUN, trainer.settings(), *kinds, also=("costs",))
        elif is_main() and job.overwrite and not job.resume:
            clear(job.out)
        trainer.accelerator.wait_for_everyone()
        if text.let_write(trainer, bars.update):
            output.line(
                f"Note    {RUN}/{SELF_WRITTEN} was of other steps or batches: the model has "
                "written it anew, and the run goes on with that"
            )
        records = _prune(job, trainer, held_out, bars, started)
    if not is_main():
        return None
    for record in records.values():
        check_reached(record)
    return Result(records, held_out, trainer.pruning.first_scores)


def _prune(
    job: PruneJob,
    trainer: NutePruneTrainer,
    held_out: Mapping[str, Tensor],
    bars: Bars,
    started: float,
) -> dict[Path, dict[str, Any]]:
    """Train, finalize, write and judge; returns folder -> record of each checkpoint."""
    # Held in few bits, or in parts, the run's own model can be neither judged nor cut.
    apart = job.bits is not None or trainer.args.sharded
    place = "cpu" if apart else str(trainer.args.device)
    provenance = origin(job.model) if is_main() else {}
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    judge = Judge(held_out, tokenizer, bars)
    before = None
    if is_main() and not apart:
        before = judge.figures("the dense model", trainer.anatomy.model)
    if trainer.args.max_steps > 0:
        trainer.train(resume_from_checkpoint=goes_on(job) or None)
    trainer.settle()
    if not is_main():
        return {}
    if before is None:  # nobody waits for it any more
        before = judge.figures("the dense model", load_model(job.model, trainer.computed_dtype))
    if job.resume:
        clear_result(job.out, job.overwrite)
    records = {}
    for index, small in _smaller(job, trainer):
        after = judge.figures("the pruned model", _as_judged(small, trainer, place))
        if trainer.args.offload:  # as it is written
            bring_home(small)
        if index == len(trainer.targets) - 1:
            samples = side_by_side(tokenizer, judge.prompts_BT, before.texts, after.texts)
            write_extra(job.out / RUN, SAMPLES, samples)
        folder = target_folder(job, [target.asked for target in trainer.goals], index)
        records[folder] = trainer.save_pruned(
            folder,
            outside(job),
            **judge.entries(before, after),
            **provenance,
            config=recorded(job, trainer.args),
            seconds=round(time.monotonic() - started, 1),
        )
    return dict(sorted(records.items(), key=lambda item: item[1]["target"]))


def _smaller(job: PruneJob, trainer: NutePruneTrainer) -> Iterator[tuple[int, PreTrainedModel]]:
    """Yield (index of a target, its smaller model); the last target is first, of the run's own."""
    *earlier, last = range(len(trainer.targets))
    yield last, trainer.finalize(partial(whole, job) if trainer.ending.reloads else None)
    for index in earlier:
        yield index, trainer.finalize_target(index, whole(job))


def _as_judged(small: PreTrainedModel, trainer: NutePruneTrainer, place: str) -> PreTrainedModel:
    """Return a smaller model as its file will compute, on a device."""
    small = in_dtype(small, trainer.computed_dtype).requires_grad_(False)
    offload_if_asked(Anatomy(small), trainer.args, trainer.pruning.ready.origin)
    return cast(PreTrainedModel, small.to(place))  # type: ignore[arg-type]


def recorded(job: PruneJob, args: NutePruneConfig) -> dict[str, Any]:
    """Return the settings that reproduce a run: the job's, and those that are not defaults."""
    by_share = args.shape is None and args.asked[0].kind == "sparsity"
    target = {"target_sparsity": args.target_sparsity} if by_share else {}
    specs, shares = mixture(job, args.sharded)
    text = {"data": specs if len(specs) > 1 else specs[0], "shares": shares}
    costs = job.settings.get("costs")
    table = {"costs": costs} if args.target_speedup is not None and isinstance(costs, str) else {}
    found = {**job.recorded(), **text, **target, **table, **chosen_settings(args)}
    if args.world_size > 1:  # one process does the same in as many passes
        passes = args.gradient_accumulation_steps * args.world_size
        found["gradient_accumulation_steps"] = passes
    return found


def whole(job: PruneJob) -> PreTrainedModel:
    """Load the dense model to the CPU, its weights whole and as they are stored."""
    return load_model(job.model, None)
