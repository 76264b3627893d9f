"""The main job: a dense checkpoint in, a smaller checkpoint out. Shared by `prune` and `demo`."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from nuteprune.console import Bars, Output, megabytes
from nuteprune.data.blocks import (
    BlockDataset,
    check_positions,
    held_out_blocks,
    training_blocks,
)
from nuteprune.errors import RunFailed, UserError
from nuteprune.export.checkpoint import as_stored, assemble
from nuteprune.export.loading import in_dtype
from nuteprune.export.record import write_pruned
from nuteprune.jobs.job import (
    Job,
    alone,
    check_out,
    clear,
    clear_result,
    make_config,
    nothing_left,
    run_config,
    settings_of_user,
    target_folder,
)
from nuteprune.jobs.progress import StepProgress
from nuteprune.jobs.resume import check_same, remember, resume_from
from nuteprune.jobs.show import print_dry_run, print_plan
from nuteprune.jobs.sources import (
    STORED_DTYPE,
    load_model,
    load_tokenizer,
    origin,
    pick_dtype,
)
from nuteprune.judge.perplexity import mean, perplexities, protocol
from nuteprune.judge.run_files import write_extra
from nuteprune.judge.samples import continuations, prompts, side_by_side
from nuteprune.model.anatomy import Anatomy
from nuteprune.processes import is_main
from nuteprune.run_folder import RUN, SAMPLES
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.setup import make_allocator, run_targets
from nuteprune.train.trainer import NutePruneTrainer


@dataclass
class Result:
    """What a job leaves.

    Args:
        records: folder -> record of each checkpoint, one per target, growing.
        held_out: the text that they were judged by, source -> (N, T).
        scores: the units' scores before training, kind -> (N,).
    """

    records: dict[Path, dict[str, Any]]
    held_out: Mapping[str, Tensor]
    scores: dict[str, Tensor]


def run(job: Job, output: Output) -> Result | None:
    """Do the job; returns None for a dry run, and in all processes of a run but the main one.

    Raises:
        UserError: for anything in the job that cannot work; nothing is written then.
        RunFailed: if training breaks down or a target is missed.
    """
    started = time.monotonic()
    # Trainer makes its folder at once, so a dry run gets one that nobody keeps.
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch) if job.dry_run else job.out
        if is_main() and not job.dry_run:
            stack.enter_context(alone(job.out))
        if is_main():  # the others may come when it has begun to write
            check_out(job)
        with nothing_left(folder):
            return _run(job, make_config(job, folder / RUN), output, started)


def _run(job: Job, config: NutePruneConfig, output: Output, started: float) -> Result | None:
    tokenizer = load_tokenizer(job.model, job.trust_remote_code)
    dtype = pick_dtype(job.dtype, job.device)
    model = load_model(job.model, dtype, job.bits, str(config.device))
    training, held_out = _texts(job, config, tokenizer, model)
    with output.bars() as bars:
        trainer = make_trainer(model, config, training, tokenizer, bars)
        print_plan(job, trainer, output)
        if job.dry_run:
            print_dry_run(trainer, output)
            return None
        if is_main() and job.resume:
            check_same(job, trainer)
        elif is_main() and job.overwrite:
            clear(job.out)
        trainer.accelerator.wait_for_everyone()
        records = _prune(job, trainer, held_out, bars, started)
    if not is_main():
        return None
    for record in records.values():
        if record["sparsity"] < record["target"] - 1e-9:  # the division rounds
            raise RunFailed(
                f"the target was missed: {record['sparsity']:.2%} of {record['target']:.2%}"
            )
    return Result(records, held_out, trainer.first_scores)


def _texts(
    job: Job, config: NutePruneConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[BlockDataset, dict[str, Tensor]]:
    """Return the blocks to train on, and those to judge by, per source."""
    check_positions(job.length, model.config)
    shared: dict[str, Any] = {
        "length": job.length,
        "text_column": job.text_column,
        "vocab_size": Anatomy(model).embedding.weight.shape[0],
    }
    _check_room(config.blocks, job.length)
    training = training_blocks(job.data, tokenizer, count=config.blocks, seed=config.seed, **shared)
    judged = job.eval_data or job.data
    return training, held_out_blocks(judged, tokenizer, count=job.eval_blocks, **shared)


def _check_room(count: int, length: int) -> None:
    needed = 4 * count * length
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise UserError(
            f"{count} blocks of {length} tokens take {megabytes(needed)} of memory, and this "
            f"machine has {megabytes(memory)}; pass fewer steps, a smaller batch or length"
        )


def make_trainer(
    model: PreTrainedModel,
    config: NutePruneConfig,
    training: BlockDataset,
    tokenizer: PreTrainedTokenizerBase,
    bars: Bars,
) -> NutePruneTrainer:
    """Return a trainer that shows its progress."""
    with settings_of_user():
        trainer = NutePruneTrainer(model, config, training, tokenizer, progress=bars.update)
        # Made for trial, since a run makes them when it has begun to write.
        trainer.create_optimizer_and_scheduler(max(1, config.max_steps))
        trainer.optimizer = trainer.lr_scheduler = None
    trainer.stored_dtype = stored_dtype(model)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepProgress(trainer, bars))
    return trainer


def _prune(
    job: Job,
    trainer: NutePruneTrainer,
    held_out: Mapping[str, Tensor],
    bars: Bars,
    started: float,
) -> dict[Path, dict[str, Any]]:
    """Train, finalize, write and judge; returns folder -> record of each checkpoint."""

    def measure(what: str, model: torch.nn.Module) -> dict[str, float]:
        bars.update(f"measuring {what}", 0, 1)
        found = perplexities(model, held_out, batch_size=4)
        bars.update(f"measuring {what}", 1, 1, f"perplexity {mean(found):.2f}")
        return found

    # Held in few bits, or in parts, the run's own model can be neither judged nor cut.
    apart = job.bits is not None or trainer.args.sharded
    computed, place = trainer.computed_dtype, "cpu" if apart else str(trainer.args.device)
    before: dict[str, float] = {}
    dense_texts: list[str] = []
    prompts_BT, provenance = prompts(held_out), origin(job.model) if is_main() else {}
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)

    def judge_dense(model: PreTrainedModel) -> None:
        before.update(measure("the dense model", model))
        dense_texts.extend(continuations(model, tokenizer, prompts_BT))

    def as_judged(small: PreTrainedModel) -> PreTrainedModel:
        return cast(PreTrainedModel, in_dtype(small, computed).to(place))  # type: ignore[arg-type]

    if is_main() and not apart:
        judge_dense(trainer.anatomy.model)
    if is_main() and not job.resume:
        remember(job, trainer)
    if trainer.args.max_steps > 0:
        trainer.train(resume_from_checkpoint=resume_from(job))
    trainer.settle()
    if not is_main():
        return {}
    if apart:  # nobody waits for it any more
        judge_dense(load_model(job.model, computed))
    if job.resume:
        clear_result(job.out, job.overwrite)
    records = {}
    *stops, last = range(len(trainer.targets))
    for index in (last, *stops):
        if index == last:
            small = trainer.finalize(partial(_whole, job) if trainer.reloads else None)
            judged = as_judged(small)
            texts = continuations(judged, tokenizer, prompts_BT)
            samples = side_by_side(tokenizer, prompts_BT, dense_texts, texts)
            write_extra(job.out / RUN, SAMPLES, samples)
        else:
            small = trainer.finalize_stop(index, _whole(job))
            judged = as_judged(small)
        after = measure("the pruned model", judged)
        if not all(map(math.isfinite, after.values())):
            raise RunFailed(
                f"the pruned model's perplexity is not finite ({after}); use --dtype float32, or a "
                "lower learning rate"
            )
        folder = target_folder(job, trainer.targets, index)
        records[folder] = trainer.save_pruned(
            folder,
            perplexity={"before": before, "after": after, "protocol": protocol(held_out)},
            **provenance,
            config=run_config(job, trainer.args),
            seconds=round(time.monotonic() - started, 1),
        )
    return dict(sorted(records.items(), key=lambda item: item[1]["target"]))


def one_shot(
    job: Job, scores: Mapping[str, Tensor], held_out: Mapping[str, Tensor], out: Path
) -> dict[str, Any]:
    """Write what the first ranking alone gives: nothing trained, nothing re-fitted."""
    model = _whole(job)
    stored = stored_dtype(model)
    anatomy = Anatomy(model)
    config = make_config(job, out)
    allocator = make_allocator(anatomy, config)
    target = run_targets(allocator, config)[-1]
    masks = allocator.masks(allocator.shape(scores, target), scores)
    params = {"before": anatomy.parameters(), "blocks_before": allocator.budget.before}
    small, shape = assemble(anatomy, masks)
    computed = pick_dtype(job.dtype, job.device)
    after = perplexities(in_dtype(small, computed), held_out, batch_size=4)
    return write_pruned(
        out,
        as_stored(small, stored),
        None,
        params,
        target=target,
        before=allocator.budget.shape,
        after=shape,
        perplexity={"before": {}, "after": after},
    )


def _whole(job: Job) -> PreTrainedModel:
    """Load the dense model to the CPU, its weights whole and as exact as they are stored."""
    return load_model(job.model, pick_dtype(job.dtype, job.device), exact=True)


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype that the checkpoint was stored in, which the result keeps."""
    stored = getattr(model, STORED_DTYPE, None)
    return stored if isinstance(stored, torch.dtype) else model.dtype
