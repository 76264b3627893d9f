"""`--minutes`: how a run shares its time out over text, scores and steps.

The run times what it is going to do most: writing a token, and teaching a block. Other stages take
multiples of a block (docs/cost.md). So the plan is settled before the first stage, and the record
has it as plain settings. How many steps there are is settled when they begin: by then most of the
time is spent, and what is left is known.
"""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nuteprune.console import Output, duration
from nuteprune.errors import UserError
from nuteprune.gates.importance import METHODS
from nuteprune.jobs.folder import is_stated
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.prune_run import make_run, seconds_writing, share_to_write, trainer_config
from nuteprune.plan.trial import BESIDE, StepTimes, step_times
from nuteprune.processes import main_ones
from nuteprune.run import Run
from nuteprune.run_folder import RUN, SETTINGS
from nuteprune.stages.score import stops_before, with_gradients
from nuteprune.stages.write import tokens_to_write
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.declared import read_settings
from nuteprune.train.prepare import Prepared
from nuteprune.train.trainer import NutePruneTrainer

GRADIENTS, JUDGE = 1.1, 0.6
"""Times per block, as multiples of teaching one: gradients for the scores; judging, with its share
of copying."""
BY_LAYER, REFIT = 0.95, 1.2
"""The same of what has no language head, as multiples of the decoder's part of teaching a block:
what scores read layer by layer; refit."""
CUT = 0.6
"""Time to score a unit of attention by cutting it, as such a multiple. The share of them that is
cut is about the share to remove; see `copying_kept`."""
LATER = 1.3
"""Time to write text, as a multiple of what its first positions take."""
OPTIONS = (32, 24, 16, 12, 8)
"""Blocks for the scores, the best first."""
BEFORE = 0.85
"""Share of the time that the stages before the first step may take, judging left aside: blocks for
scores and refit gain more than steps."""
JUDGING = 0.12
"""Share of all the time that judging by text may take."""
FEWEST = 4
"""Steps that a run has at least."""
LEAST_JUDGED = 8
"""Blocks of each source that a run is judged by at least."""
PLAN = ("max_steps", "calibration_blocks", "text_blocks", "eval_blocks")
"""Settings that a plan consists of."""
TIMED = 2**14
"""Tokens, for the time that writing one takes: fewer make small batches, which are slower each."""


def seconds_of(minutes: float | str) -> float:
    """Return the seconds of `10` (minutes), `90s`, `10m` or `2h`.

    Raises:
        UserError: if it is none of these, or not above 0.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh]?)\s*", str(minutes))
    seconds = float(found[1]) * {"s": 1, "": 60, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UserError(f"--minutes is {minutes}; pass minutes, such as 10, or 90s or 2h")
    return seconds


@dataclass(frozen=True)
class Rates:
    """How fast this machine is with a model.

    Args:
        block: seconds to teach a block.
        token: seconds to write a token more; 0 where the model writes none.
        first: seconds to write the least text that a run writes; what is beyond costs `token`.
        answers: seconds until the student has answered once.
    """

    block: float
    token: float
    first: float = 0.0
    answers: float = 0.0


def within_minutes(job: PruneJob, scratch: Path, output: Output) -> PruneJob:
    """Return a job with the settings that its minutes allow; see `shared_out`.

    Args:
        job: a job with minutes. One that goes on with a run gets that run's plan.
        scratch: a folder for what nobody keeps.
        output: prints the plan.

    Raises:
        UserError: if there is no time for anything sensible, or steps are given too.
    """
    seconds = _asked(job)
    if is_stated(job):
        plan = {name: x for name, x in read_settings(job.out / RUN).items() if name in PLAN}
        return _planned(job, plan)
    small = replace(job, settings={**job.settings, "max_steps": 1, "calibration_blocks": 1})
    with output.bars() as bars:
        trial = make_run(small, trainer_config(small, scratch), bars)
        rates = _measured(trial)
    left = seconds - (time.monotonic() - job.started)
    rates, left = main_ones((rates, left))  # all processes make the main one's plan
    settings, step, judging = shared_out(job, trial, rates, left)
    del trial  # a model, in cycles
    gc.collect()
    output.line(
        f"Time    {duration(seconds)}: {settings['calibration_blocks']} blocks for the scores, "
        f"about {settings['max_steps']} steps of {step:.1f} s; {duration(judging)} to judge"
    )
    return _planned(job, settings)


def _asked(job: PruneJob) -> float:
    """Return the seconds that a job is given; errors as of `within_minutes`."""
    assert job.minutes is not None
    if "max_steps" in job.settings:
        raise UserError("--minutes and --steps both say how long to train; pass one of them")
    if "text_blocks" in job.settings:
        raise UserError(
            "--minutes decides how much text there is, and so does --set text_blocks: pass --steps "
            "in place of --minutes, or leave text_blocks out"
        )
    if job.settings.get("progressive"):
        raise UserError("a ramp has its steps in its recipe: pass --steps in place of --minutes")
    return seconds_of(job.minutes)


def _planned(job: PruneJob, plan: Mapping[str, Any]) -> PruneJob:
    """Return a job with the settings of a plan; the blocks to judge by are the job's own."""
    settings = {name: x for name, x in plan.items() if name != "eval_blocks"}
    return replace(
        job,
        settings={**job.settings, **settings},
        eval_blocks=plan.get("eval_blocks", job.eval_blocks),
    )


def _measured(run: Run) -> Rates:
    """Time a step, and the first positions of what the model writes."""
    token, first = 0.0, 0.0
    timed = step_times(run.first, passes=1)
    if run.text.to_write:
        first = seconds_writing(run, run.text.to_write)
        token = max(0.0, seconds_writing(run, TIMED) - first) / TIMED
    return Rates(timed.step / run.args.sequences_per_step, token, first, timed.answers)


def shared_out(
    job: PruneJob, trial: Run, rates: Rates, seconds: float
) -> tuple[dict[str, Any], float, float]:
    """Return the settings that fit into the time: blocks, steps, text.

    Args:
        job: the job.
        trial: a run of it that has not begun.
        rates: those of the machine.
        seconds: the time left.

    Returns:
        Settings by name, the seconds of a step, and those of judging the dense model and the
        results by text, answers and context.

    Raises:
        UserError: if there is no time for anything sensible.
    """
    sources = max(1, len(trial.held_out))
    judged = JUDGE * rates.block * sources * (1 + len(trial.targets))  # seconds, a block of each
    beside = rates.block * (BESIDE * len(trial.targets) + job.after)
    allowed = (JUDGING * seconds - beside) / judged
    each = round(min(job.eval_blocks, max(LEAST_JUDGED, allowed)))
    judging = judged * each + beside
    left = seconds - judging
    given = job.settings.get("calibration_blocks")
    options = [given] if given else OPTIONS
    for scored in options:
        settings = {**job.settings, "calibration_blocks": scored, "max_steps": 1}
        args = trainer_config(replace(job, settings=settings), job.out)
        before, taught = _times(job, trial, rates, args)
        steps = taught.within((left - before) / len(trial.targets))
        share = 1.0 if scored == options[-1] else BEFORE
        if before <= share * left and steps >= FEWEST:
            break
    else:
        if not job.may_exceed:
            teaching = taught.of(FEWEST) * len(trial.targets)
            needed = before + judging + teaching + time.monotonic() - job.started
            raise UserError(
                f"--minutes {job.minutes} is too little time: on this machine "
                f"{math.ceil(needed / 60)} minutes are needed; pass more, or --steps 0 --method "
                "taylor for the least there is"
            )
        steps = FEWEST
    blocks = max(steps * trial.args.sequences_per_step, args.calibrated_blocks)
    plan = {"calibration_blocks": scored, "max_steps": steps, "text_blocks": blocks}
    return {**plan, "eval_blocks": each}, taught.step, judging


def _times(
    job: PruneJob, trial: Run, rates: Rates, args: NutePruneConfig
) -> tuple[float, StepTimes]:
    """Return the seconds from the first stage to the first step, without judging, and of steps."""
    targets, model = trial.targets, trial.model
    method = METHODS[args.method]
    sizes = model.layout.sizes
    attention = sum(sum(sizes[kind]) for kind in ("heads", "kv_groups") if kind in model.kinds)
    decoder = _decoder_share(model)
    scored = GRADIENTS * with_gradients(args.method, args.scored_blocks)
    scored += BY_LAYER * decoder * method.by_layer * args.scored_blocks
    scored += CUT * method.cuts * attention * targets[-1].sparsity
    refit = REFIT * decoder * args.refit_blocks
    again = args.tried and model.can_try_cuts
    stops = len(stops_before(targets[-1].sparsity)) * again
    blocks = (1 + stops) * scored + (stops + len(targets)) * refit
    share = share_to_write(job)
    read = args.calibrated_blocks
    written = tokens_to_write(read, read, share, job.length) if share else 0
    text = LATER * (rates.first + rates.token * written) if written else 0.0
    # Steps beyond what is calibrated on need text too, which is written before.
    more = LATER * rates.token * share * job.length
    step = (rates.block + more) * args.sequences_per_step
    return blocks * rates.block + text, StepTimes(step, rates.answers)


def _decoder_share(model: Prepared) -> float:
    """Return the decoder's share of the weights that a token goes through; the head has the rest.

    Of a small model with a large vocabulary it is a third, so refit takes half of what it takes of
    another model whose steps are as fast.
    """
    budget = model.allocator.budget
    decoder = budget.before - budget.idle(budget.shape)
    head: int = model.anatomy.embedding.weight.numel()
    return decoder / (decoder + head)


def steps_in_time_of(job: PruneJob) -> Callable[[Run, NutePruneTrainer], int]:
    """Return a function for the number of steps: those in the time left, or those once begun."""
    end = job.started + _asked(job)
    if is_stated(job):
        return _steps_begun

    def steps_in_time(run: Run, trainer: NutePruneTrainer) -> int:
        left = len(run.targets) - run.targets.index(trainer.target)
        taught = step_times(trainer)
        block = taught.step / trainer.args.sequences_per_step
        # So far the dense model was judged, and each result before this one, beside it.
        judged = run.products.costs.get("judge", {}).get("seconds", 0.0)
        done = len(run.targets) - left
        each = max(0.0, judged - BESIDE * block * done) / (1 + done)
        texts = left
        if not judged:  # weights in few bits: the dense model is judged beside the first result
            each, texts = JUDGE * block * sum(map(len, run.held_out.values())), left + 1
        judging = each * texts + (BESIDE * left + job.after) * block
        return max(FEWEST, taught.within((end - time.monotonic() - judging) / left))

    return steps_in_time


def _steps_begun(run: Run, trainer: NutePruneTrainer) -> int:
    """Return the steps that a target was begun with; else the last one's, or the plan's."""
    begun = (trainer.run_folder / SETTINGS).is_file()
    kept = read_settings(trainer.run_folder) if begun else {}
    return int(kept.get("max_steps", run.args.max_steps))
