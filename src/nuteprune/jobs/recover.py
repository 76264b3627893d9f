"""The work of `recover`: a pruned checkpoint in, the same one fine-tuned out."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from nuteprune.console import Bars, Output, dtype_name, megabytes, millions, quiet_loading
from nuteprune.data.examples import Examples, holds_instructions
from nuteprune.data.fingerprint import text_entry
from nuteprune.data.training_text import JUDGED
from nuteprune.errors import RunFailed, UserError
from nuteprune.export.card import perplexities_of
from nuteprune.export.checkpoint import as_stored, round_as_stored, save
from nuteprune.export.record import weights_size, write_again
from nuteprune.jobs import sources
from nuteprune.jobs.folder import clear, clear_result, goes_on
from nuteprune.jobs.guard import alone, check_out, nothing_left
from nuteprune.jobs.job import (
    EPOCHS,
    INSTRUCTIONS,
    RATES,
    STEPS,
    TEMPLATES,
    TEXT,
    RecoverJob,
    what_it_is,
)
from nuteprune.jobs.read_settings import make_job, settings_of_user
from nuteprune.jobs.recover_text import check_room, judged_text, training_text
from nuteprune.jobs.show import StepProgress
from nuteprune.judge.context import copying
from nuteprune.judge.perplexity import mean, perplexities, protocol
from nuteprune.memory import peak
from nuteprune.model.anatomy import Anatomy
from nuteprune.processes import is_main
from nuteprune.run_folder import RECORD, RUN
from nuteprune.train.config import RecoverConfig
from nuteprune.train.declared import check_same
from nuteprune.train.recover import RecoverTrainer


def recover(
    model: str,
    *,
    out: str | os.PathLike[str],
    data: str | None = None,
    steps: int | None = None,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any] | None:
    """Fine-tune a pruned checkpoint on instructions or text, as `nuteprune recover` does.

    Args:
        model: the pruned checkpoint; any other of a supported family will do.
        out: folder for the result.
        data: what to learn: chat or instruction rows, or plain text; a file, a folder, a hub
            dataset, or `demo`.
        steps: optimizer steps.
        quiet: print nothing.
        **settings: the command's other options by name: fields of `RecoverJob`.

    Returns:
        The record, if there is one, with `recover` (what was done and found) and the folder as
        `out`. None in all processes of a run but the main one.

    Raises:
        UserError: for anything that cannot work; nothing is written then.
        RunFailed: if training breaks down.
    """
    given = {"model": model, "out": out, "data": data, "steps": steps}
    job = make_job(RecoverJob, {**given, **settings})
    with quiet_loading():
        return run_and_report(job, Output(quiet=quiet))


def run_and_report(job: RecoverJob, output: Output) -> dict[str, Any] | None:
    """Do the job, and print what came out; returns the same as `recover`."""
    with alone(job.out) if is_main() else nullcontext():
        if is_main():  # the others may come when it has begun to write
            check_out(job)
        result = _run(job, output)
    if result is not None:
        print_recovered(result, output)
    return result


def _run(job: RecoverJob, output: Output) -> dict[str, Any] | None:
    """Tune a model and write it; returns None in all processes of a run but the main one."""
    if job.steps is not None and job.epochs is not None:
        raise UserError("--steps and --epochs both say how long; pass one of them")
    record = sources.record_of(job.model)
    tokenizer = sources.load_tokenizer(job.model, job.trust_remote_code)
    sources.around(job.model)  # a run does not end where its files cannot be had
    named, judged = judged_text(job, record, tokenizer, output)
    job = replace(job, eval_data=named)  # what judges is what settings and record state
    kind = INSTRUCTIONS if holds_instructions(job.text, job.text_column) else TEXT
    if kind == TEXT and job.epochs is not None:
        raise UserError(f"{job.text} is plain text, which has no epochs; pass --steps")
    if kind == TEXT and job.template != TEMPLATES[0]:
        raise UserError(f"{job.text} is plain text, which has no template; leave --template out")
    model, autocast = _load(job)
    config = _config(job, kind, **autocast)
    training = training_text(job, kind, config, tokenizer, model)
    check_room(training, judged, model)
    with output.bars() as bars:
        with nothing_left(job.out), settings_of_user():
            trainer = RecoverTrainer(model, config, training, tokenizer, job=what_it_is(job))
        trainer.remove_callback(PrinterCallback)
        progress = StepProgress(trainer, bars, "recovering")
        trainer.add_callback(progress)
        print_recovery(job, trainer, training, record, output)
        if job.resume:
            check_same(job.out / RUN, trainer.settings(), RecoverJob, RecoverConfig)
        elif is_main() and job.overwrite:
            clear(job.out)
        trainer.accelerator.wait_for_everyone()
        before, after, small = _train(job, trainer, judged, bars)
    if not is_main():
        return None
    entry = {
        **_settings(job, kind, trainer, training),
        "seconds_per_step": statistics.median(progress.seconds) if progress.seconds else None,
        "perplexity": {"before": before, "after": after, "protocol": protocol(judged)},
        "text": text_entry(training, judged, record),
    }
    return _write(job, small, tokenizer, record, entry)


def _load(job: RecoverJob) -> tuple[PreTrainedModel, dict[str, bool]]:
    """Load the weights in their stored dtype or a wider one; autocast computes in less."""
    computed = sources.pick_dtype(job.dtype, sources.pick_device(job.device))
    model = sources.load_model(job.model, None)  # mapped from its files: what is converted is held
    stored = sources.stored_dtype(model)
    finer = torch.finfo(stored).eps < torch.finfo(computed).eps
    if computed == torch.float16 or finer:
        return model, {"fp16": computed == torch.float16, "bf16": computed == torch.bfloat16}
    return model if stored == computed else sources.load_model(job.model, computed), {}


def _config(job: RecoverJob, kind: str, **more: Any) -> RecoverConfig:
    steps = job.steps if job.steps or kind == INSTRUCTIONS else STEPS
    return RecoverConfig(
        output_dir=str(job.out / RUN),
        disable_tqdm=True,
        save_strategy="steps",
        save_total_limit=2,
        use_cpu=sources.pick_device(job.device) == "cpu",
        max_steps=steps or -1,
        num_train_epochs=job.epochs or EPOCHS,
        learning_rate=RATES[kind] if job.learning_rate is None else job.learning_rate,
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=job.accumulation,
        gradient_checkpointing=job.gradient_checkpointing or None,
        **{x: getattr(job, x) for x in ("lora_rank", "save_steps", "seed", "report_to")},
        **more,
    )


def _train(
    job: RecoverJob, trainer: RecoverTrainer, judged: Mapping[str, Tensor], bars: Bars
) -> tuple[dict[str, float], dict[str, float], PreTrainedModel]:
    """Measure, train, merge and measure again."""

    def measure(what: str, model: PreTrainedModel) -> dict[str, float]:
        bars.update(what, 0, 1)
        found = perplexities(model, judged, batch_size=JUDGED)
        bars.update(what, 1, 1, f"perplexity {mean(found):.2f}")
        return found

    # The adapters add nothing before the first step.
    before = measure("measuring the model", Anatomy(trainer.model).model)
    trainer.train(resume_from_checkpoint=goes_on(job) or None)
    small = trainer.merge()
    round_as_stored(small, sources.stored_dtype(small))  # judged is what will be in the file
    after = measure("measuring the result", small)
    if not all(map(math.isfinite, after.values())):
        raise RunFailed("the result's perplexity is not finite; lower --learning-rate")
    return before, after, small


def _settings(
    job: RecoverJob, kind: str, trainer: RecoverTrainer, training: Dataset[Any]
) -> dict[str, Any]:
    """Return what the record says of the recovery."""
    args = trainer.args
    return {
        "data": job.text,
        "kind": kind,
        "template": job.template if kind == INSTRUCTIONS else None,
        "text_column": job.text_column,
        "eval_data": job.eval_data,
        "sequences": len(cast(Any, training)),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch if kind == INSTRUCTIONS else None,
        "asked_for": "steps" if args.max_steps > 0 else "epochs",
        "batch_size": args.sequences_per_step,
        "length": job.length,
        "learning_rate": args.learning_rate,
        "lora_rank": args.lora_rank,
        "dtype": job.dtype,
        "device": str(args.device),
        "seed": args.seed,
        "peak_memory_bytes": peak(),
        "versions": {x: version(x) for x in ("nuteprune", "torch", "transformers", "peft")},
    }


def _write(
    job: RecoverJob,
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: Mapping[str, Any] | None,
    entry: dict[str, Any],
) -> dict[str, Any]:
    if job.resume:
        clear_result(job.out, job.overwrite)
    as_stored(small, sources.stored_dtype(small))
    result = {"out": str(job.out), "recover": entry}
    if record is None:
        save(small, job.out, tokenizer, sources.around(job.model))
        return {**result, "bytes_on_disk": weights_size(job.out)}
    if "recover" in record:
        entry["earlier"] = record["recover"]
    new = {**record, "recover": entry, "perplexity": judged_again(record, entry)}
    for key in ("copying", "answers", "context"):  # measured before the fine-tuning
        new.pop(key, None)
    if (copied := copying(small, tokenizer)) is not None and "copying" in record:
        new["copying"] = {**record["copying"], "after": copied.percent}
    return {**result, **write_again(job.out, small, tokenizer, new, sources.around(job.model))}


def judged_again(record: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record's perplexities: the dense model's stay where the blocks are the same."""
    found, protocol = entry["perplexity"], record.get("perplexity", {}).get("protocol")
    before, after = perplexities_of(record)
    same = protocol == found["protocol"] and set(after) == set(found["after"])
    return {**found, "before": before if same else {}}


def print_recovery(
    job: RecoverJob,
    trainer: RecoverTrainer,
    training: Dataset[Any],
    record: Mapping[str, Any] | None,
    output: Output,
) -> None:
    """Print what `recover` is going to do, in a few lines."""
    args, anatomy = trainer.args, Anatomy(trainer.model)
    pruned = f", {record['sparsity']:.1%} of its decoder pruned" if record else ", not pruned"
    output.line(f"Model   {job.model}: {millions(anatomy.parameters())} parameters{pruned}")
    what = "plain text"
    if isinstance(training, Examples):
        without = (
            f" ({training.skipped} rows without an answer within {job.length} tokens left out)"
        )
        left_out = without if training.skipped else ""
        what = f"{len(training)} examples, answers learned{left_out}"
    output.line(f"Data    {job.text}: {what}")
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    output.line(
        f"Run     {trainer.steps()} steps of {args.sequences_per_step} x {job.length} tokens at "
        f"most on {args.device}, {dtype_name(anatomy.model.dtype)}; LoRA rank {args.lora_rank} on "
        f"all projections ({millions(trained)} parameters) at {args.learning_rate:g}"
    )


def print_recovered(result: Mapping[str, Any], output: Output) -> None:
    """Print perplexities before and after, and where the checkpoint is."""
    entry = result["recover"]
    found = entry["perplexity"]
    untouched = result.get("perplexity", {}).get("before", {})
    columns = {"dense": untouched} if untouched else {}
    columns |= {"before": found["before"], "after": found["after"]}
    rows = [
        [source, *(f"{column[source]:.2f}" for column in columns.values())]
        for source in found["after"]
    ]
    rows.append(["mean", *(f"{mean(column):.2f}" for column in columns.values())])
    output.line()
    output.table("Perplexity on held-out text", ["", *columns], rows)
    pace = entry["seconds_per_step"]
    took = f", {pace:.2f} s each (median)" if pace is not None else ""
    output.line(f"{entry['steps']} steps{took}; {megabytes(result['bytes_on_disk'])} on disk")
    if "sparsity" not in result:
        output.line(f"{result['out']} has no {RECORD}: the model was not pruned by nuteprune")
    output.line(f"Checkpoint in {result['out']}")
