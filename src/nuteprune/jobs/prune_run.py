"""From a prune job to its run: model, text and trainers, and what cannot be done for a wrapper."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback

from nuteprune.console import Bars
from nuteprune.data.fingerprint import Fingerprint, text_entry
from nuteprune.errors import UserError
from nuteprune.export.record import read_record
from nuteprune.files import at_home, file_sum, to_json
from nuteprune.jobs.job import PruneJob, what_it_is
from nuteprune.jobs.progress import StepProgress
from nuteprune.jobs.settings import settings_of_user
from nuteprune.jobs.sources import (
    around,
    load_model,
    load_tokenizer,
    origin,
    pick_device,
    pick_dtype,
    stored_dtype,
    use_family,
)
from nuteprune.jobs.text import mixture, text_of
from nuteprune.model.anatomy import Anatomy
from nuteprune.products import Products
from nuteprune.run import Run
from nuteprune.run_folder import RUN
from nuteprune.train.checks import check_placement
from nuteprune.train.config import NutePruneConfig, prune_config
from nuteprune.train.prepare import Prepared, prepare
from nuteprune.train.run_settings import chosen_settings
from nuteprune.train.targets import COUNTED, Target
from nuteprune.train.trainer import NutePruneTrainer

if TYPE_CHECKING:
    from nuteprune.export.wrapping import Around


OWN_TEXT_SUM = "own_text_sha256"
"""Key in settings.json for the hash of the text's file, by which a resumed run knows its text."""


def trainer_config(job: PruneJob, folder: Path) -> NutePruneConfig:
    """Return the settings of a job's trainer.

    Args:
        job: the job.
        folder: the run's folder.

    Raises:
        UserError: if they cannot work.
    """
    keeps = {"save_strategy": "steps", "save_total_limit": 2}
    here = {"disable_tqdm": True, "use_cpu": pick_device(job.device) == "cpu"}
    with settings_of_user():
        given = {**keeps, **job.settings, **here}
        return prune_config(job.settings)(output_dir=str(folder), **given)


def make_run(job: PruneJob, config: NutePruneConfig, bars: Bars) -> Run:
    """Load what a job names, and make its run.

    Args:
        job: the job.
        config: its trainer's settings.
        bars: where progress is shown.

    Raises:
        UserError: for anything that cannot work; nothing is written then.
    """
    check_placement(config, packed=job.bits is not None)
    use_family(job.family, job.model)
    whole = None if job.text_only else around(job.model)
    check_priced(job, config, whole)
    tokenizer = load_tokenizer(job.dense, job.trust_remote_code)
    model = load_model(job.dense, pick_dtype(job.dtype, job.device), job.bits, str(config.device))
    stored, cut, before = stored_dtype(model), None, 0
    if job.vocab is not None and not job.dry_run:
        cut = read_record(Path(job.dense))
        before = cut["params"]["before"]
    elif isinstance(job.vocab, int):
        from nuteprune.jobs.vocab import with_fewer  # few runs ask for it

        before = Anatomy(model).parameters()
        model, tokenizer = with_fewer(model, tokenizer, job.vocab)
    text = text_of(job, config, tokenizer, Anatomy(model))
    held_out = text.held_out(job.eval_data or job.specs, job.eval_blocks)
    if config.target_speedup is not None:
        from nuteprune.jobs.speed import costs_for  # few runs ask for it

        config.costs = costs_for(job, config, model, bars)
    with settings_of_user():
        prepared = prepare(model, config, stored)
    if job.vocab is not None:
        tokens = before - prepared.origin.parameters
        facts: dict[str, Any] = {"parameters": before, "tokens": tokens}
        of_all = replace(prepared.origin, **facts, entries=origin(job.model))
        prepared = replace(prepared, origin=of_all)
    check_wrapper(job, prepared, whole)
    shared = Path(str(config.output_dir))

    def folder_of(goal: Target) -> Path:
        return job.out if len(prepared.goals) == 1 else job.out / goal.asked.folder

    def run_folder_of(goal: Target) -> Path:
        return shared if len(prepared.goals) == 1 else folder_of(goal) / RUN

    what = what_it_is(job) | _hashes(job, config)

    def trainer_of(goal: Target) -> NutePruneTrainer:
        own = copy.copy(config)
        kind = import_module(config.PIPELINE).TRAINER
        with settings_of_user():
            trainer: NutePruneTrainer = kind(
                prepared,
                own,
                text.training,
                tokenizer,
                goal=goal,
                products=products,
                progress=bars.update,
                job=what,
            )
            trainer.check_optimizer()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(StepProgress(trainer, bars, "teach"))
        own.output_dir = str(run_folder_of(goal))  # Trainer makes its folder at once: not yet
        return trainer

    products = Products(None, {})
    first = trainer_of(prepared.goals[0])  # settings fail, and the model is placed, before all else
    settings = first.settings()
    depend: dict[str, Any] = {x: settings[x] for x in ("model", "dtype", "nuteprune")}
    depend |= {} if job.vocab is None else {"vocab": settings["vocab"]}
    products = Products(None if job.dry_run else shared, depend, job.resume)
    if cut is not None:
        products.costs |= cut["stages"]
        text.training.fingerprint.update(Fingerprint(cut["text"]))

    def about() -> dict[str, Any]:
        seconds = round(time.monotonic() - job.started, 1)
        earlier = origin(job.model)
        known = text_entry(text.training, held_out, earlier)
        found = {**earlier, "config": recorded(job, config), "text": known, "seconds": seconds}
        if cut is not None:  # which tokens stay at a number is the same if that was found
            found |= {"vocab": cut["vocab"]}
            found["config"]["vocab"] = cut["vocab"]["after"]
        return found

    return Run(
        model=prepared,
        args=config,
        text=text,
        held_out=held_out,
        products=products,
        progress=bars.update,
        first=first,
        trainer_of=trainer_of,
        reload=lambda dtype: load_model(job.dense, dtype),
        folder_of=folder_of,
        run_folder_of=run_folder_of,
        resumes=job.resume,
        around=whole,
        about=about,
    )


def _hashes(job: PruneJob, config: NutePruneConfig) -> dict[str, str]:
    """Return hashes of the table of costs and of self-written text, wherever their files are."""
    found = {} if job.own_text is None else {OWN_TEXT_SUM: file_sum(at_home(job.own_text))}
    named = job.settings.get("costs") is not None and config.target_speedup is not None
    if named and isinstance(config.costs, Mapping):
        table = to_json(config.costs).encode()
        found["costs"] = hashlib.blake2b(table, digest_size=8).hexdigest()
    return found


def check_priced(job: PruneJob, config: NutePruneConfig, whole: Around | None) -> None:
    """Refuse a size of a model of several modalities: its language model alone has a price.

    Raises:
        UserError: naming what to pass instead.
    """
    kind = config.asked[0].kind
    if kind in COUNTED and whole is not None:
        raise UserError(
            f"--{kind.replace('_', '-')} cannot be used here: {job.model} has parts for images "
            "beside its language model, which are not priced; pass --sparsity, or "
            "--set text_only=true"
        )


def check_wrapper(job: PruneJob, model: Prepared, whole: Around | None) -> None:
    """Refuse what cannot be put back into a wrapper, and a wrapper that is not whole.

    A narrower model cannot be put back, nor a mixture of free shapes.

    Raises:
        UserError: naming what to do instead.
    """
    if whole is None:
        return
    constraints = model.allocator.constraints
    if model.allocator.budget.per_token and not constraints.uniform:
        raise UserError(
            f"free shapes cannot be used here: {job.model} holds a mixture of experts within a "
            "model of several modalities; pass --shapes uniform, or --set text_only=true"
        )
    if "hidden" in constraints.kinds:
        raise UserError(
            f"gates on hidden cannot be used here: what {job.model} makes of images is as wide as "
            "its language model; leave hidden out of --gates, or pass --set text_only=true"
        )
    whole.check()


def recorded(job: PruneJob, args: NutePruneConfig) -> dict[str, Any]:
    """Return the settings that reproduce a run: the job's, and those that are not defaults."""
    specs, shares = mixture(job)
    found = {**job.recorded(), "data": specs if len(specs) > 1 else specs[0], "shares": shares}
    if args.shape is None and args.asked[0].kind == "sparsity":
        found["target_sparsity"] = args.target_sparsity
    costs = job.settings.get("costs")
    if args.target_speedup is not None and isinstance(costs, str):
        found["costs"] = costs
    found |= chosen_settings(args)
    if args.world_size > 1:  # one process does the same in as many passes
        passes = args.gradient_accumulation_steps * args.world_size
        found["gradient_accumulation_steps"] = passes
    return found
