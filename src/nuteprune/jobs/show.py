"""What `prune` prints: the plan before, the steps while they are done, the result after."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from nuteprune.console import Bars, Output, dtype_name, duration, megabytes, millions
from nuteprune.data.specs import DEMO
from nuteprune.errors import RunFailed, UserError
from nuteprune.export.card import figure_rows
from nuteprune.gates.budget import Budget
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.sources import held_in_mxfp4, read_config, stored_dtype
from nuteprune.judge.perplexity import mean
from nuteprune.judge.run_files import read_samples
from nuteprune.run import Run
from nuteprune.run_folder import RUN
from nuteprune.train.asked import spelled
from nuteprune.train.checkpoints import AtomicTrainer
from nuteprune.train.targets import COUNTED, IN_PARAMETERS, Target, reached

LARGE = 0.5
"""Share of the parameters from which an embedding is worth cutting first (docs/tables.md)."""


def print_tokens(vocab: Mapping[str, Any], output: Output) -> None:
    """Print how many tokens stay, and what that costs by itself."""
    from nuteprune.jobs.fewer_tokens import costs  # few runs have it

    output.line(
        f"Vocab   {vocab['after']} of {vocab['before']} tokens; quality is compared with the model "
        "cut to these"
    )
    bits = vocab["bits_per_character"]
    output.line(f"        {costs(bits['before'], bits['after'])}")


def print_plan(job: PruneJob, run: Run, output: Output) -> None:
    """Print the plan of a job in a few lines."""
    args, prepared = run.args, run.model
    budget, model = prepared.allocator.budget, prepared.anatomy.model
    shape, total = budget.shape, prepared.origin.parameters
    first = shape.layers[0]
    targets = ", ".join(describe_target(target) for target in run.targets)
    removed = budget.before * run.targets[-1].sparsity
    output.line(
        f"Model   {job.model}: {prepared.anatomy.family.model_type}, {millions(total)} parameters"
    )
    output.line(
        f"        {len(shape.layers)} layers of width {shape.hidden}, {first.heads} heads on "
        f"{first.kv_heads} KV heads, {_inner(budget)}"
        f"{f', {prepared.anatomy.embedding.weight.shape[0]} tokens' if job.vocab else ''}"
    )
    output.line(
        f"Target  {targets} of {millions(budget.before)} decoder parameters = "
        f"{millions(removed)} ({removed / total:.1%} of all)"
    )
    output.line(
        f"        {args.shapes} shapes, gates on {', '.join(prepared.kinds)} "
        f"(at most {prepared.allocator.maximum():.1%})"
    )
    held = f" (projections held in {job.bits} bits)" if job.bits else ""
    specs, shares = run.text.specs, run.text.shares
    said = " + ".join(
        f"{x / sum(shares):.0%} {spec}" for spec, x in zip(specs, shares, strict=True)
    )
    output.line(
        f"Run     {args.max_steps} steps of {args.sequences_per_step} x {job.length} tokens on "
        f"{args.device}, {dtype_name(model.dtype)}{held}"
    )
    output.line(
        f"        {run.first.manner()}LoRA rank {args.lora_rank} at {args.learning_rate:g}; "
        f"text {said}"
    )
    if held_in_mxfp4(read_config(job.model)):
        stored = dtype_name(stored_dtype(model))
        output.line(
            f"Note    the experts are in MXFP4 and are unpacked: what is written is {stored}, "
            "nearly four times as large for each of them"
        )
    embedded = prepared.anatomy.embedding.weight.numel() / total
    if embedded > LARGE and not job.vocab:
        output.line(
            f"Note    the embedding has {embedded:.0%} of all parameters, and this run keeps it; "
            "--vocab auto removes tokens that the text hardly needs"
        )
    if job.specs == [DEMO] and job.model != DEMO:
        output.line(
            "Note    the text is the demo's, in English; what a model is taught on is what it "
            "keeps, so pass text of its use with --data"
        )


def _inner(budget: Budget) -> str:
    """Return what a model's MLPs consist of: neurons, or experts."""
    first = next((x for x in budget.shape.layers if x.experts), budget.shape.layers[0])
    if not first.experts:
        return f"{first.neurons} neurons"
    return f"{first.experts} experts of {first.expert_neurons} neurons, {budget.per_token} a token"


def describe_target(target: Target) -> str:
    """Return a target as text, with the sparsity that it comes to."""
    share = f"{target.sparsity:.1%}"
    return share if target.asked.kind in ("sparsity", "shape") else f"{target.asked} = {share}"


def print_report(folder: Path, output: Output) -> None:
    """Write the report of a checkpoint and say where it is; the checkpoint stands without it."""
    from nuteprune.judge.report import write_report  # matplotlib, which little else needs

    try:
        output.line(f"Report  {write_report(folder)}")
    except (UserError, RunFailed) as error:
        output.line(f"Report  none: {error}")


COUNTS_SHOWN = (
    ("parameters", ""),
    ("  in decoder layers", "blocks_"),
    ("  active per token", "active_"),
)
"""Name of a count of parameters -> prefix of its keys in a record."""


def print_result(folder: Path, record: Mapping[str, Any], output: Output, answers: bool) -> None:
    """Print one checkpoint's record as tables and two lines; its answers too if `answers`."""
    ppl, params, both = record["perplexity"], record["params"], ("before", "after")
    rows = []
    if (counted := record.get("vocab")) is not None:
        rows.append(["tokens", *(str(counted[x]) for x in both)])
    for what, of in COUNTS_SHOWN:
        if f"{of}before" in params:
            rows.append([what, *(millions(params[f"{of}{x}"]) for x in both)])
    for name in ppl["before"]:
        rows.append([f"perplexity, {name}", *(f"{ppl[x][name]:.2f}" for x in both)])
    if (copied := record.get("copying")) is not None:
        rows.append(["copying, % right", *(f"{copied[x]:.1f}" for x in both)])
    output.table("Held-out text, before and after", ["", "dense", "pruned"], rows)
    print_beside(record, read_samples(folder / RUN) if answers else [], output)
    asked = record["asked"]
    goal = f"target {record['target']:.1%}"
    if asked["kind"] in COUNTED:
        say = millions if asked["kind"] in IN_PARAMETERS else megabytes
        wanted = spelled(asked["kind"], asked["value"])
        goal = f"{asked['kind']} {say(reached(record))} of {wanted}"
    output.line(f"Reached {record['sparsity']:.3%} of the decoder is gone ({goal})")
    print_end(folder, record, output)


def print_beside(
    record: Mapping[str, Any], samples: Sequence[Mapping[str, str]], output: Output
) -> None:
    """Print what a record says of answers and context, and answers side by side.

    Args:
        record: with `answers` and `context`, or one of them, or neither.
        samples: as `read_samples` returns them.
        output: where to.
    """
    for title, rows in figure_rows(record).items():
        output.line()
        output.table(title, ["", "dense", "pruned"], [list(row.cells) for row in rows])
    for sample in samples:
        output.line(f"The {sample['which']} answer, by repeats: {sample['prompt']}")
        for who in ("dense", "pruned"):
            output.line(f"  {who}: {' '.join(sample[who].split())}")


def print_end(folder: Path, record: Mapping[str, Any], output: Output) -> None:
    """Print a sentence on a checkpoint, and its path."""
    params, ppl = record["params"], record["perplexity"]
    said = [
        f"{record['total_sparsity']:.0%} smaller",
        f"held-out perplexity {mean(ppl['after']) / mean(ppl['before']):.2f} x dense",
    ]
    if (answers := record.get("answers")) is not None:
        loops = answers["looping"]
        said.append(f"{loops['after']:.0f} % of answers loop (dense {loops['before']:.0f} %)")
    output.line(f"Result  {'; '.join(said)}")
    output.line(
        f"        {millions(params['after'])} of {millions(params['before'])} parameters, "
        f"{megabytes(record['bytes_on_disk'])}, made in {duration(record['seconds'])}"
    )
    if (vocab := record.get("vocab")) is not None:
        print_tokens(vocab, output)
    output.line(f"Saved   {folder}")


class StepProgress(TrainerCallback):
    """Feeds a progress bar from the trainer's logs, and notes how long each step takes.

    Args:
        trainer: whose run it is.
        bars: where it is shown.
        what: the bar's name.
    """

    def __init__(self, trainer: AtomicTrainer, bars: Bars, what: str) -> None:
        self.trainer, self.bars, self.what = trainer, bars, what
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._started)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Show the newest figures."""
        if logs and "loss" in logs:
            note = self.trainer.note(logs)
            self.bars.update(self.what, state.global_step, state.max_steps, note)
