"""The work of `recover`: a pruned checkpoint in, the same one fine-tuned out."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)

from nuteprune.console import Bars, Output
from nuteprune.data.blocks import check_ids, check_positions, training_blocks
from nuteprune.data.conversations import check_template
from nuteprune.data.examples import holds_instructions, read_examples
from nuteprune.errors import RunFailed, UserError
from nuteprune.export.checkpoint import as_stored, round_as_stored, save
from nuteprune.export.record import weights_size, write_again
from nuteprune.jobs.comparison import (
    Tuned,
    compared,
    judged_again,
    judged_text,
    note,
    same_tokens,
)
from nuteprune.jobs.job import (
    Job,
    alone,
    check_out,
    clear,
    clear_result,
    nothing_left,
    settings_of_user,
)
from nuteprune.jobs.progress import RecoveryProgress
from nuteprune.jobs.prune import stored_dtype
from nuteprune.jobs.resume import resume_from
from nuteprune.jobs.show import print_recovery, sequences_per_step
from nuteprune.jobs.sources import load_model, load_tokenizer, pick_device, pick_dtype, record_of
from nuteprune.judge.bench import Work
from nuteprune.judge.perplexity import mean, perplexities, protocol
from nuteprune.memory import peak
from nuteprune.model.anatomy import Anatomy
from nuteprune.processes import is_main
from nuteprune.run_folder import DENSE, RUN
from nuteprune.train.recover import RecoverConfig, RecoverTrainer
from nuteprune.train.state import last_checkpoint

INSTRUCTIONS, TEXT = "instructions", "text"
RATES = {INSTRUCTIONS: 1e-4, TEXT: 1e-3}
"""Kind of data -> rate of LoRA; the paper's for instructions, many of which take many steps."""
EPOCHS = 2.0
STEPS = 200


@dataclass(frozen=True)
class Recovery:
    """What `recover` is asked to do.

    Args:
        job: models, data, folders and settings.
        steps: optimizer steps; None: by epochs, for plain text `STEPS`.
        epochs: passes over instruction data; None: `EPOCHS`.
        learning_rate: None: by the kind of data.
        template: see `pieces.TEMPLATES`.
        against: the dense model, to be tuned in the same way for comparison; None: no comparison.
    """

    job: Job
    steps: int | None
    epochs: float | None
    learning_rate: float | None
    template: str
    against: str | None = None


def run(asked: Recovery, output: Output) -> dict[str, Any] | None:
    """Do it; returns None in all processes of a run but the main one.

    Returns:
        What `print_result` shows: `out`, `recover`, and the record where there is one.

    Raises:
        UserError: for anything that cannot work; nothing is written then.
        RunFailed: if training breaks down.
    """
    with alone(asked.job.out) if is_main() else nullcontext():
        _check(asked)
        return _run(asked, output)


def _run(asked: Recovery, output: Output) -> dict[str, Any] | None:
    record = record_of(asked.job.model)
    tokenizer = load_tokenizer(asked.job.model, asked.job.trust_remote_code)
    if asked.against is not None:
        same_tokens(tokenizer, asked.against, asked.job.trust_remote_code)
    judged = judged_text(asked.job, record, tokenizer, output)
    ours = _tune(asked, record, tokenizer, judged, output)
    if asked.against is not None:
        gc.collect()  # a trainer and its callbacks point at each other: make room
        output.line()
        dense = _tune(dense_twin(asked), None, tokenizer, judged, output)
        if ours is not None and dense is not None:
            note(ours.result, compared(asked.against, ours, dense))
    return None if ours is None else ours.result


def _tune(
    asked: Recovery,
    record: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    judged: Mapping[str, Tensor],
    output: Output,
) -> Tuned | None:
    """Tune a model and write it; returns None in all processes of a run but the main one."""
    job = asked.job
    kind = INSTRUCTIONS if holds_instructions(job.data, job.text_column) else TEXT
    config = _config(asked, kind)
    model, autocast = _load(job)
    config = _config(asked, kind, **autocast)
    training = _training_data(asked, kind, config, tokenizer, model)
    longest = max(len(item["input_ids"]) for item in cast(Any, training))
    check_positions(longest, model.config)
    for blocks in judged.values():
        check_ids(blocks, _vocabulary(model))
        check_positions(blocks.shape[1], model.config)
    with output.bars() as bars:
        with nothing_left(job.out), settings_of_user():
            trainer = RecoverTrainer(model, config, training, tokenizer)
        trainer.remove_callback(PrinterCallback)
        progress = RecoveryProgress(bars)
        trainer.add_callback(progress)
        print_recovery(job, trainer, training, record, output)
        if job.overwrite and not job.resume and is_main():
            clear(job.out)
        trainer.accelerator.wait_for_everyone()
        before, after, small = _train(job, trainer, judged, bars)
    if not is_main():
        return None
    entry = {
        **_settings(asked, kind, trainer, training),
        "seconds_per_step": statistics.median(progress.seconds) if progress.seconds else None,
        "perplexity": {"before": before, "after": after, "protocol": protocol(judged)},
    }
    work = Work.of(small)
    return Tuned(_write(job, small, tokenizer, record, entry), work.blocks + work.head)


def _check(asked: Recovery) -> None:
    job = asked.job
    if is_main():  # the others may come when it has begun to write
        for model in filter(None, (job.model, asked.against)):
            check_out(replace(job, model=model))
    check_template(asked.template)
    if asked.steps is not None and asked.epochs is not None:
        raise UserError("--steps and --epochs both say how long; pass one of them")
    for option, value in (
        ("--steps", asked.steps),
        ("--epochs", asked.epochs),
        ("--accumulation", job.settings["gradient_accumulation_steps"]),
        ("--save-steps", job.settings["save_steps"]),
    ):
        if value is not None and value <= 0:
            raise UserError(f"{option} {value}: pass more than 0")
    if job.length < 2:
        raise UserError(f"--length {job.length}: pass at least 2 tokens")


def _load(job: Job) -> tuple[PreTrainedModel, dict[str, bool]]:
    """Load the weights no narrower than they are stored; computing in less is autocast's."""
    computed = pick_dtype(job.dtype, pick_device(job.device))
    model = load_model(job.model, computed)
    stored = stored_dtype(model)
    finer = torch.finfo(stored).eps < torch.finfo(computed).eps
    if computed == torch.float16 or finer:
        if stored != computed:
            model = load_model(job.model, stored)
        return model, {"fp16": computed == torch.float16, "bf16": computed == torch.bfloat16}
    return model, {}


def _config(asked: Recovery, kind: str, **more: Any) -> RecoverConfig:
    job = asked.job
    steps = asked.steps if asked.steps or kind == INSTRUCTIONS else STEPS
    if kind == TEXT and asked.epochs is not None:
        raise UserError(f"{job.data} is plain text, which has no epochs; pass --steps")
    return RecoverConfig(
        output_dir=str(job.out / RUN),
        disable_tqdm=True,
        save_strategy="steps",
        save_total_limit=2,
        use_cpu=pick_device(job.device) == "cpu",
        max_steps=steps or -1,
        num_train_epochs=asked.epochs or EPOCHS,
        learning_rate=RATES[kind] if asked.learning_rate is None else asked.learning_rate,
        **job.settings,
        **more,
    )


def _training_data(
    asked: Recovery,
    kind: str,
    config: RecoverConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> Dataset[Any]:
    job = asked.job
    each = sequences_per_step(config)
    count = config.max_steps * each if config.max_steps > 0 else None
    given: dict[str, Any] = {
        "length": job.length,
        "text_column": job.text_column,
        "vocab_size": _vocabulary(model),
    }
    if kind == INSTRUCTIONS:
        return read_examples(
            job.data, tokenizer, most=count, template=asked.template, seed=config.seed, **given
        )
    assert count is not None
    return training_blocks(job.data, tokenizer, count=count, seed=config.seed, **given)


def dense_twin(asked: Recovery) -> Recovery:
    """Return the same for the dense model, in a folder of the run; resumed if it had begun."""
    job = asked.job
    out = job.out / RUN / DENSE
    resume = job.resume and last_checkpoint(out / RUN) is not None
    twin = replace(job, model=cast(str, asked.against), out=out, resume=resume)
    return replace(asked, job=twin, against=None)


def _vocabulary(model: PreTrainedModel) -> int:
    return int(Anatomy(model).embedding.weight.shape[0])


def _train(
    job: Job, trainer: RecoverTrainer, judged: Mapping[str, Tensor], bars: Bars
) -> tuple[dict[str, float], dict[str, float], PreTrainedModel]:
    """Measure, train, merge and measure again."""

    def measure(what: str, model: PreTrainedModel) -> dict[str, float]:
        bars.update(what, 0, 1)
        found = perplexities(model, judged, batch_size=4)
        bars.update(what, 1, 1, f"perplexity {mean(found):.2f}")
        return found

    # The adapters add nothing before the first step.
    before = measure("measuring the model", Anatomy(trainer.model).model)
    trainer.train(resume_from_checkpoint=resume_from(job))
    small = trainer.merge()
    round_as_stored(small, stored_dtype(small))  # judged is what will be in the file
    after = measure("measuring the result", small)
    if not all(map(math.isfinite, after.values())):
        raise RunFailed("the result's perplexity is not finite; lower --learning-rate")
    return before, after, small


def _settings(
    asked: Recovery, kind: str, trainer: RecoverTrainer, training: Dataset[Any]
) -> dict[str, Any]:
    """Return what the record says of the recovery."""
    job, args = asked.job, trainer.args
    return {
        "data": job.data,
        "kind": kind,
        "template": asked.template if kind == INSTRUCTIONS else None,
        "text_column": job.text_column,
        "sequences": len(cast(Any, training)),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch if kind == INSTRUCTIONS else None,
        "asked_for": "steps" if args.max_steps > 0 else "epochs",
        "batch_size": sequences_per_step(args),
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
    job: Job,
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: Mapping[str, Any] | None,
    entry: dict[str, Any],
) -> dict[str, Any]:
    if job.resume:
        clear_result(job.out, job.overwrite)
    as_stored(small, stored_dtype(small))
    result = {"out": str(job.out), "recover": entry}
    if record is None:
        save(small, job.out, tokenizer)
        return {**result, "bytes_on_disk": weights_size(job.out)}
    if "recover" in record:
        entry["earlier"] = record["recover"]
    new = {**record, "recover": entry, "perplexity": judged_again(record, entry)}
    return {**result, **write_again(job.out, small, tokenizer, new)}
