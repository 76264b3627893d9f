"""From a prune job to its run: model, text and trainers, and what cannot be done for a wrapper."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, PrinterCallback

from nuteprune.console import Bars, megabytes
from nuteprune.data.fingerprint import Fingerprint, text_entry
from nuteprune.data.tokens import check_positions
from nuteprune.data.training_text import TrainingText, checked_shares
from nuteprune.errors import UserError
from nuteprune.export.record import read_record
from nuteprune.files import at_home, file_sum, to_json
from nuteprune.jobs import sources
from nuteprune.jobs.job import PruneJob, what_it_is
from nuteprune.jobs.read_settings import settings_of_user
from nuteprune.jobs.show import StepProgress
from nuteprune.model.anatomy import Anatomy
from nuteprune.products import Products
from nuteprune.run import Run
from nuteprune.run_folder import RUN, SELF
from nuteprune.stages.write import OWN_SHARE, read_written, room, seconds_to_write, tokens_to_write
from nuteprune.train.checks import check_placement
from nuteprune.train.config import NutePruneConfig, prune_config
from nuteprune.train.declared import chosen_settings, run_settings
from nuteprune.train.prepare import Prepared, prepare
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
    here = {"disable_tqdm": True, "use_cpu": sources.pick_device(job.device) == "cpu"}
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
    sources.use_family(job.family, job.model)
    whole = None if job.text_only else sources.around(job.model)
    check_priced(job, config, whole)
    tokenizer = sources.load_tokenizer(job.dense, job.trust_remote_code)
    dtype = sources.pick_dtype(job.dtype, job.device)
    model = sources.load_model(job.dense, dtype, job.bits, str(config.device))
    stored, cut, before = sources.stored_dtype(model), None, 0
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
        of_all = replace(prepared.origin, **facts, entries=sources.origin(job.model))
        prepared = replace(prepared, origin=of_all)
    check_wrapper(job, prepared, whole)
    run_folder = Path(str(config.output_dir))

    def run_folder_of(target: Target) -> Path:
        return (
            run_folder
            if len(prepared.targets) == 1
            else run_folder.parent / target.asked.folder / RUN
        )

    what = what_it_is(job) | _hashes(job, config)
    settings = run_settings(config, what)
    depend: dict[str, Any] = {x: settings[x] for x in ("model", "dtype", "nuteprune")}
    depend |= {} if job.vocab is None else {"vocab": settings["vocab"]}
    products = Products(None if job.dry_run else run_folder, depend, job.resume)

    def trainer_of(target: Target) -> NutePruneTrainer:
        own = copy.copy(config)
        kind = import_module(config.PIPELINE).TRAINER  # `NutePruneTrainer`, or that of a ramp
        with settings_of_user():
            trainer: NutePruneTrainer = kind(
                prepared,
                own,
                text.training,
                tokenizer,
                target=target,
                products=products,
                progress=bars.update,
                job=what,
            )
            trainer.check_optimizer()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(StepProgress(trainer, bars, "teach"))
        own.output_dir = str(run_folder_of(target))  # Trainer makes its folder at once: not yet
        return trainer

    first = trainer_of(prepared.targets[0])  # settings fail and the model is placed before all else
    if cut is not None:
        products.costs |= cut["stages"]
        text.training.fingerprint.update(Fingerprint(cut["text"]))

    def about() -> dict[str, Any]:
        seconds = round(time.monotonic() - job.started, 1)
        earlier = sources.origin(job.model)
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
        reload=lambda dtype: sources.load_model(job.dense, dtype),
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


def mixture(job: PruneJob) -> tuple[list[str], list[float]]:
    """Return the calibration and training text: DATA specs and their shares.

    Where neither shares are given nor `self` is named, the model's own text guards what the data
    does not show.

    Args:
        job: the job.

    Raises:
        UserError: if shares are no numbers or do not fit the data, or self-written text has no
            share.
    """
    specs, shares = job.specs, job.share_values
    if shares is not None or SELF in specs:
        if job.own_text is not None and SELF not in specs:
            raise UserError(
                f"--shares leaves no share for --own-text {job.own_text}: leave one of the two "
                f"out, or add --data {SELF} and its share"
            )
        return specs, list(checked_shares(shares or None, specs))
    return [*specs, SELF], [(1 - OWN_SHARE) / len(specs)] * len(specs) + [OWN_SHARE]


def own_share(job: PruneJob) -> float:
    """Return the share of the text that the model writes itself; see `mixture`."""
    specs, shares = mixture(job)
    return shares[specs.index(SELF)] / sum(shares) if SELF in specs else 0.0


def share_to_write(job: PruneJob) -> float:
    """Return the share of the text that the model has yet to write; see `mixture`."""
    return own_share(job) if job.own_text is None else 0.0


def seconds_writing(run: Run, tokens: int) -> float:
    """Return about how long a run's model writes as many tokens, timed on the first positions."""
    dense, text = run.model.anatomy.model, run.text
    with run.model.model.disable_adapter():
        return seconds_to_write(dense, text.tokenizer, tokens=tokens, length=text.length)


def text_of(
    job: PruneJob, config: NutePruneConfig, tokenizer: PreTrainedTokenizerBase, model: Anatomy
) -> TrainingText:
    """Return the text of a job, for one model.

    Raises:
        UserError: if the text cannot be had, or does not suit the model.
    """
    check_positions(job.length, model.model.config)
    needed = 4 * config.blocks * job.length
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise UserError(
            f"{config.blocks} blocks of {job.length} tokens take {megabytes(needed)} of memory, "
            f"and this machine has {megabytes(memory)}; pass fewer steps, a smaller batch or length"
        )
    specs, shares = mixture(job)
    if SELF in specs:
        room(tokenizer, job.length)  # fails before anything is removed or written
    share = own_share(job)
    read = (config.blocks, config.calibrated_blocks)
    own = tokens_to_write(*read, share, job.length) if share else 0
    written = None
    if job.own_text is not None:
        # Weights in few bits are others than those that wrote.
        writer = sources.load_model(job.dense, None) if job.bits else model.model
        written = read_written(at_home(job.own_text), writer, tokenizer, tokens=own)
    text = TrainingText(
        specs,
        shares,
        tokenizer,
        job.length,
        count=config.blocks,
        to_write=own if written is None else 0,
        seed=config.seed,
        how={"text_column": job.text_column, "vocab_size": model.embedding.weight.shape[0]},
        written=written,
    )
    if job.own_text is not None:
        text.training.fingerprint.add_file(at_home(job.own_text))
    return text
