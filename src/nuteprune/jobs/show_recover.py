"""What `recover` prints: the plan before, the result after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch.utils.data import Dataset

from nuteprune.console import Output, dtype_name, megabytes, millions
from nuteprune.data.examples import Examples
from nuteprune.jobs.job import RecoverJob
from nuteprune.judge.perplexity import mean
from nuteprune.model.anatomy import Anatomy
from nuteprune.run_folder import RECORD
from nuteprune.train.recover import RecoverTrainer


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
    count = len(cast(Any, training))
    what = "plain text"
    if isinstance(training, Examples):
        without = (
            f" ({training.skipped} rows without an answer within {job.length} tokens left out)"
        )
        what = f"{count} examples, answers learned{without if training.skipped else ''}"
    output.line(f"Data    {job.text}: {what}")
    each = args.sequences_per_step
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    output.line(
        f"Run     {trainer.steps()} steps of {each} x {job.length} tokens at most on "
        f"{args.device}, {dtype_name(anatomy.model.dtype)}; LoRA rank {args.lora_rank} on all "
        f"projections ({millions(trained)} parameters) at {args.learning_rate:g}"
    )


def print_recovered(result: Mapping[str, Any], output: Output) -> None:
    """Print perplexities before and after, and where the checkpoint is."""
    entry = result["recover"]
    found, dense = entry["perplexity"], entry.get("against")
    record = result.get("perplexity", {}).get("before", {})
    untouched = dense["perplexity"]["before"] if dense else record
    columns = {"dense": untouched} if untouched else {}
    columns |= {"before": found["before"], "after": found["after"]}
    if dense:
        columns["dense, tuned"] = dense["perplexity"]["after"]
    rows = [
        [source, *(f"{column[source]:.2f}" for column in columns.values())]
        for source in found["after"]
    ]
    rows.append(["mean", *(f"{mean(column):.2f}" for column in columns.values())])
    output.line()
    output.table("Perplexity on held-out text", ["", *columns], rows)
    if dense:
        _print_comparison(dense, output)
    pace = entry["seconds_per_step"]
    took = f", {pace:.2f} s each (median)" if pace is not None else ""
    output.line(f"{entry['steps']} steps{took}; {megabytes(result['bytes_on_disk'])} on disk")
    if "sparsity" not in result:
        output.line(f"{result['out']} has no {RECORD}: the model was not pruned by nuteprune")
    output.line(f"Checkpoint in {result['out']}")


def _print_comparison(dense: Mapping[str, Any], output: Output) -> None:
    """Say how much of the change is recovery, and how much any model gains from such text."""
    before, after = (dense["retention"][when].get("mean") for when in ("before", "after"))
    if before is not None and after is not None:
        won = round(after, 1) - round(before, 1)
        said = f"{won:.1f} points won back" if won > 0 else "both were fitted to the text alike"
        output.line(
            f"Of {dense['model']}, {before:.1f} % is retained before and {after:.1f} % after the "
            f"same tuning of both: {said}"
        )
    if dense["time_ratio"] is not None:
        output.line(
            f"A step takes {dense['time_ratio']:.2f} x the time of the dense model's "
            f"({dense['seconds_per_step']:.2f} s), with {dense['work_ratio']:.2f} x the weights to "
            "multiply"
        )
    output.line(f"The tuned dense model is in {dense['out']}")
