"""`nuteprune recover`: fine-tunes a pruned checkpoint, and merges what was learned into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from nuteprune.cli import options as o
from nuteprune.console import Output, megabytes
from nuteprune.files import at_home
from nuteprune.jobs.job import Job
from nuteprune.jobs.recover import Recovery, run
from nuteprune.judge.perplexity import mean
from nuteprune.run_folder import RECORD


def recover(
    model: o.Model,
    out: o.Out,
    data: Annotated[
        str,
        typer.Option(
            help="What to learn: rows of chat `messages` or of instruction, input and output, "
            "or plain text; a file, a folder, a hub dataset id[:config[:split]], or 'demo'."
        ),
    ] = "demo",
    against: Annotated[
        str | None,
        typer.Option(help="The dense model: tuned in the same way afterwards, and compared."),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Text to judge by; default: what the pruned model was judged by."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; default for plain text: 200.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over instruction data; default: 2.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Rate of LoRA; default: 1e-4, for plain text 1e-3.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA, on all projections.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Forward passes per step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens per sequence, at most.")] = 256,
    template: Annotated[
        str,
        typer.Option(help="Of instruction rows: chat, alpaca, or auto (chat if the model has it)."),
    ] = "auto",
    device: o.Device = None,
    dtype: o.Dtype = None,
    text_column: o.TextColumn = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 42,
    report_to: o.ReportTo = None,
    gradient_checkpointing: o.Checkpointing = False,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints of the run.")] = 50,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Fine-tune MODEL, a pruned checkpoint, to win back quality.

    LoRA on all projections is trained and merged. The result is a checkpoint of the same shape and
    dtype, with its record kept.
    """
    output = Output(as_json)
    job = Job(
        model=model,
        data=data,
        out=at_home(out),
        eval_data=eval_data,
        text_column=text_column,
        length=length,
        device=device or "auto",
        dtype=dtype or "auto",
        settings={
            "lora_rank": lora_rank,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_checkpointing": gradient_checkpointing,
            "save_steps": save_steps,
            "seed": seed,
            "report_to": o.trackers(report_to) or "none",
        },
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    result = run(Recovery(job, steps, epochs, learning_rate, template, against), output)
    if result is not None:
        print_result(result, output)


def print_result(result: Mapping[str, Any], output: Output) -> None:
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
    output.result(result)


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
