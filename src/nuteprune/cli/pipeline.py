"""The main job: an intact checkpoint in, a smaller checkpoint out. Shared by `prune` and `demo`."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from nuteprune.cli.output import Bars, Output, megabytes, millions
from nuteprune.cli.progress import StepProgress
from nuteprune.cli.sources import STORED_DTYPE, load_model, load_tokenizer, pick_device, pick_dtype
from nuteprune.errors import RunFailed, UserError
from nuteprune.export.checkpoint import assemble
from nuteprune.export.record import write_pruned
from nuteprune.judge.perplexity import mean, perplexities, protocol
from nuteprune.model.anatomy import Anatomy
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.data import BlockDataset, held_out_blocks, training_blocks
from nuteprune.train.setup import make_allocator
from nuteprune.train.state import last_checkpoint
from nuteprune.train.trainer import NutePruneTrainer

RUN = "run"
"""Folder inside the output folder for checkpoints, teachers and metrics."""


@dataclass
class Job:
    """What `prune` is asked to do.

    Args:
        model: hub id, checkpoint folder, or `demo`.
        data: training text; see `train.data`.
        out: folder for the result.
        eval_data: text to judge by; None: the held-out part of `data`.
        text_column: column of the text in structured files.
        length: tokens per block.
        eval_blocks: held-out blocks per source.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16`, ...: what the run computes in.
        settings: overrides of `NutePruneConfig`.
        dry_run: say what would be done, and write nothing.
        resume: go on from the last checkpoint in `out`.
        overwrite: replace what is in `out`.
    """

    model: str
    data: str
    out: Path
    eval_data: str | None = None
    text_column: str | None = None
    length: int = 256
    eval_blocks: int = 24
    device: str = "auto"
    dtype: str = "auto"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    dry_run: bool = False
    resume: bool = False
    overwrite: bool = False


@dataclass
class Result:
    """What a job leaves: the folder, its record, the text it was judged by, the first scores."""

    out: Path
    record: dict[str, Any]
    held_out: Mapping[str, Tensor]
    scores: dict[str, Tensor]


def check_out(job: Job) -> None:
    """Refuse an output folder with something in it, unless told what to do with it.

    Raises:
        UserError: if the folder is in the way, or there is nothing to resume in it.
    """
    out = job.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if job.resume:
        if last_checkpoint(out / RUN) is None:
            raise UserError(f"nothing to resume in {out}: there is no checkpoint in {out / RUN}")
        return
    if out.exists() and any(out.iterdir()) and not job.overwrite:
        raise UserError(
            f"--out {out} is not empty; name another folder, or pass --overwrite to replace it or "
            "--resume to go on with it"
        )


def run(job: Job, output: Output) -> Result | None:
    """Do the job; returns None for a dry run.

    Raises:
        UserError: for anything in the job that cannot work; nothing is written then.
        RunFailed: if training breaks down or the target is missed.
    """
    started = time.monotonic()
    check_out(job)
    # Trainer makes its folder at once, so a dry run gets one that nobody keeps.
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if job.dry_run else job.out
        config = NutePruneConfig(output_dir=str(folder / RUN), **trainer_settings(job))
        return _run(job, config, output, started)


def _run(job: Job, config: NutePruneConfig, output: Output, started: float) -> Result | None:
    tokenizer = load_tokenizer(job.model)
    model = load_model(job.model, pick_dtype(job.dtype, job.device))
    vocabulary = Anatomy(model).embedding.weight.shape[0]
    blocks = config.max_steps * config.train_batch_size * config.gradient_accumulation_steps
    data: dict[str, Any] = {"length": job.length, "text_column": job.text_column}
    training = training_blocks(
        job.data,
        tokenizer,
        count=max(blocks, config.calibration_blocks),
        seed=config.seed,
        vocab_size=vocabulary,
        **data,
    )
    held_out = held_out_blocks(
        job.eval_data or job.data, tokenizer, count=job.eval_blocks, vocab_size=vocabulary, **data
    )
    with output.bars() as bars:
        trainer = make_trainer(model, config, training, tokenizer, bars)
        print_plan(job, trainer, output)
        if job.dry_run:
            return None
        if not job.resume:
            shutil.rmtree(job.out, ignore_errors=True)
        record = _prune(job, trainer, held_out, bars, started)
    if record["sparsity"] < job_target(trainer):
        raise RunFailed(
            f"the target was missed: {record['sparsity']:.2%} of {job_target(trainer):.2%}"
        )
    return Result(job.out, record, held_out, trainer.first_scores)


def job_target(trainer: NutePruneTrainer) -> float:
    """Return the sparsity asked for, rounding errors of the division forgiven."""
    return trainer.args.target_sparsity - 1e-9


def trainer_settings(job: Job) -> dict[str, Any]:
    """Return the settings for `NutePruneConfig`: the job's device on top of its overrides."""
    device = pick_device(job.device)
    return {
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 2,
        **job.settings,
        "use_cpu": device == "cpu",
    }


def make_trainer(
    model: PreTrainedModel,
    config: NutePruneConfig,
    training: BlockDataset,
    tokenizer: PreTrainedTokenizerBase,
    bars: Bars,
) -> NutePruneTrainer:
    """Return a trainer that shows its progress."""
    trainer = NutePruneTrainer(model, config, training, tokenizer, progress=bars.update)
    trainer.stored_dtype = stored_dtype(model)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepProgress(trainer, bars))
    return trainer


def print_plan(job: Job, trainer: NutePruneTrainer, output: Output) -> None:
    """Print what is going to be done, in a few lines."""
    args, budget, model = trainer.args, trainer.allocator.budget, trainer.anatomy.model
    shape = budget.shape
    total = trainer.anatomy.parameters()
    first = shape.layers[0]
    goal = budget.before * args.target_sparsity
    output.line(
        f"Model   {job.model}: {trainer.anatomy.family.model_type}, {len(shape.layers)} layers, "
        f"{first.heads} heads on {first.kv_heads} KV heads, {first.neurons} neurons, "
        f"width {shape.hidden}, {millions(total)} parameters"
    )
    output.line(
        f"Target  {args.target_sparsity:.1%} of {millions(budget.before)} decoder parameters = "
        f"{millions(goal)} ({goal / total:.1%} of all), {args.shapes} shapes, gates on "
        f"{', '.join(trainer.kinds)} (at most {trainer.allocator.maximum():.1%})"
    )
    output.line(
        f"Run     {args.max_steps} steps of {args.train_batch_size} x {job.length} tokens on "
        f"{args.device}, {str(model.dtype).removeprefix('torch.')}; masks freeze at step"
        f" {trainer.freeze_step}; {args.teachers} teachers; LoRA rank {args.lora_rank} at "
        f"{args.learning_rate:g}; text {job.data}"
    )
    if job.dry_run:
        ones = {k: torch.ones(trainer.allocator.layout.units(k)) for k in trainer.kinds}
        reached = trainer.allocator.shape(ones, args.target_sparsity)
        after = total - budget.before + budget.parameters(reached)
        output.line(
            f"Dry run nothing is written. Reachable: {budget.sparsity(reached):.3%}, about "
            f"{millions(after)} parameters"
        )
        output.result({"sparsity": budget.sparsity(reached), "shape": reached.to_dict()})


def _prune(
    job: Job,
    trainer: NutePruneTrainer,
    held_out: Mapping[str, Tensor],
    bars: Bars,
    started: float,
) -> dict[str, Any]:
    """Train, finalize, write and judge; returns the record that was written."""
    bars.update("measuring the intact model", 0, 1)
    before = perplexities(trainer.anatomy.model, held_out, batch_size=4)
    bars.update("measuring the intact model", 1, 1, f"perplexity {mean(before):.2f}")
    if trainer.args.max_steps > 0:
        trainer.train(resume_from_checkpoint=_resume_from(job))
    if job.resume:
        clear_result(job.out)
    bars.update("measuring the pruned model", 0, 1)
    after = perplexities(trainer.finalize(), held_out, batch_size=4)
    bars.update("measuring the pruned model", 1, 1, f"perplexity {mean(after):.2f}")
    return trainer.save_pruned(
        job.out,
        perplexity={"before": before, "after": after, "protocol": protocol(held_out)},
        base_model=job.model,
        config=run_config(job, trainer.args),
        seconds=round(time.monotonic() - started, 1),
    )


def one_shot(
    job: Job, scores: Mapping[str, Tensor], held_out: Mapping[str, Tensor], out: Path
) -> dict[str, Any]:
    """Write what the first ranking alone gives: nothing trained, nothing re-fitted."""
    model = load_model(job.model, pick_dtype(job.dtype, job.device))
    stored = stored_dtype(model)
    anatomy = Anatomy(model)
    allocator = make_allocator(anatomy, NutePruneConfig(**trainer_settings(job)))
    masks = allocator.masks(allocator.shape(scores, job.settings["target_sparsity"]), scores)
    params = {"before": anatomy.parameters(), "blocks_before": allocator.budget.before}
    small, shape = assemble(anatomy, masks)
    after = perplexities(small, held_out, batch_size=4)
    return write_pruned(
        out,
        cast(Any, small).to(stored),
        None,
        params,
        target=job.settings["target_sparsity"],
        before=allocator.budget.shape,
        after=shape,
        perplexity={"before": {}, "after": after},
    )


def clear_result(out: Path) -> None:
    """Remove what an earlier end of a run wrote, and keep the run itself."""
    for path in out.iterdir():
        if path.is_dir() and path.name != RUN:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _resume_from(job: Job) -> str | None:
    checkpoint = last_checkpoint(job.out / RUN) if job.resume else None
    return str(checkpoint) if checkpoint else None


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype that the checkpoint was stored in, which the result keeps."""
    stored = getattr(model, STORED_DTYPE, None)
    return stored if isinstance(stored, torch.dtype) else model.dtype


def run_config(job: Job, args: NutePruneConfig) -> dict[str, Any]:
    """Return the settings that reproduce a run: the job's, and those that are not defaults."""
    defaults = NutePruneConfig()
    changed = {
        f.name: getattr(args, f.name)
        for f in dataclasses.fields(args)
        if f.init
        and f.name in NUTEPRUNE_KEYS
        and getattr(args, f.name) != getattr(defaults, f.name)
    }
    own = {k: str(v) for k, v in vars(job).items() if k in ("model", "data", "dtype", "device")}
    return {**own, "length": job.length, "target_sparsity": args.target_sparsity, **changed}


NUTEPRUNE_KEYS = frozenset(f.name for f in dataclasses.fields(NutePruneConfig)) - {
    "output_dir",
    "disable_tqdm",
    "use_cpu",
    "logging_dir",
    "report_to",
}


def print_result(result: Result, output: Output) -> None:
    """Print what came out, as a table and two lines."""
    record = result.record
    ppl, params = record["perplexity"], record["params"]
    rows = [
        ["parameters", millions(params["before"]), millions(params["after"])],
        [
            "  in decoder layers",
            millions(params["blocks_before"]),
            millions(params["blocks_after"]),
        ],
        *(
            [f"perplexity, {name}", f"{ppl['before'][name]:.2f}", f"{ppl['after'][name]:.2f}"]
            for name in ppl["before"]
        ),
    ]
    output.table("Held-out text, before and after", ["", "intact", "pruned"], rows)
    output.line(
        f"Sparsity {record['sparsity']:.3%} (target {record['target']:.1%}); "
        f"{record['total_sparsity']:.2%} of all parameters are gone; "
        f"{megabytes(record['bytes_on_disk'])} on disk; {record['seconds']:.0f} s"
    )
    output.line(f"Checkpoint in {result.out}")
    output.result({"out": str(result.out), **record})
