"""The commands: each turns its options into what a job is asked to do, and returns that job.

What computes is loaded when the options are known to be right: help and refusals do without.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nuteprune.cli import options as o
from nuteprune.data.specs import DEMO
from nuteprune.errors import UserError
from nuteprune.files import at_home, data_files
from nuteprune.jobs.folder import DEMOS, demo_folder
from nuteprune.jobs.guard import check_file, check_free, check_writable
from nuteprune.jobs.job import AUTO_MEANS, PruneJob, RecoverJob, VocabJob
from nuteprune.jobs.options import Benchmark, Evaluation, Exporting, Writing
from nuteprune.jobs.read_settings import check_target, make_job
from nuteprune.train.asked import value_of
from nuteprune.train.settings import PruneSettings

_NOT_ASKED = (
    *("out", "data", "eval_data", "text_column", "shares", "trust_remote_code", "vocab"),
    *("device", "bits", "offload", "minutes", "resume", "overwrite", "dry_run"),
)
"""Settings of `prune` that `plan` does not offer."""


@o.command(
    PruneSettings, PruneJob, but=("data", "eval_data", "text_column", "trust_remote_code", "family")
)
def demo(
    out: o.OptionalOut = None, config: o.Config = None, assignments: o.Set = None, **given: Any
) -> o.Work:
    """Prune SmolLM2-135M-Instruct on real text; no arguments needed.

    Without --out the result is in ./nuteprune-demo, or -2, -3, ... where that is taken;
    with --overwrite always in ./nuteprune-demo.
    """
    folder = DEMOS if "overwrite" in given else demo_folder("resume" in given)
    asked = {"model": DEMO, "out": folder if out is None else out, **given}
    job = make_job(PruneJob, asked, config, assignments or ())
    check_free(job)
    from nuteprune.jobs.demo import run_and_report

    return partial(run_and_report, job)


@o.command(PruneSettings, PruneJob, but=_NOT_ASKED)
def plan(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder with a config.json, config.json, or 'demo'.")
    ],
    devices: Annotated[int, typer.Option(help="Accelerators.")] = 1,
    device_memory: Annotated[
        str | None,
        typer.Option(help="Memory of each, such as 24GiB: plan lists settings that fit."),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="Speed in 10^12 operations a second. Default: measured here."),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            help="Memory speed in 10^9 bytes a second. Default: measured; with --tflops no limit."
        ),
    ] = None,
    config: o.Config = None,
    assignments: o.Set = None,
    **given: Any,
) -> o.Work:
    """Say what memory and time it would take to prune MODEL.

    Phase by phase, from the config alone: no weights are read.
    """
    if devices < 1 or not all(x is None or x > 0 for x in (tflops, bandwidth)):
        raise UserError("--devices, --tflops and --bandwidth must be above 0")
    if devices > 1 and device_memory is None:
        raise UserError(f"--devices {devices}: say what memory each has with --device-memory")
    asked = {"model": model, "out": Path("unused"), **given}
    job = make_job(PruneJob, asked, config, assignments or ())
    memory = None
    if device_memory is not None:
        memory = value_of("memory", device_memory, "--device-memory")
    rate = None if tflops is None else tflops * 1e12
    reading = None if bandwidth is None else bandwidth * 1e9
    from nuteprune.jobs.plan import Devices, run

    return partial(run, job, Devices(devices, memory, rate, reading))


@o.command(PruneSettings, PruneJob)
def prune(
    model: o.Model, out: o.Out, config: o.Config = None, assignments: o.Set = None, **given: Any
) -> o.Work:
    """Make MODEL smaller by SPARSITY, guided by text from DATA.

    --dry-run says first which shapes can be had, and what time and memory the run would take.
    """
    asked = {"model": model, "out": out, **given}
    job = make_job(PruneJob, asked, config, assignments or ())
    check_target(job)
    check_free(job)
    from nuteprune.jobs.prune import run_and_report

    return partial(run_and_report, job)


@o.command(Evaluation)
def evaluate(model: o.Model, **given: Any) -> o.Work:
    """Measure how good MODEL is: perplexity, copying, answers, tasks.

    Perplexity is measured on text, copying on random tokens. With --against also whether greedy
    answers loop, and what is lost on tokens that need their context. Tasks are zero-shot unless
    --fewshot says otherwise. Without --data, --protocol and --tasks the text is the held-out part
    of the demo's.
    """
    asked = Evaluation(model, **given)
    from nuteprune.jobs.evaluate import run

    return partial(run, asked)


@o.command(Benchmark)
def bench(model: o.Model, **given: Any) -> o.Work:
    """Measure how fast MODEL reads and writes, and its memory.

    Prompts are random tokens. Each model has a process of its own; with --against they take turns,
    so that other work of the machine slows both alike.
    """
    asked = Benchmark(model, **given)
    from nuteprune.jobs.bench import run

    return partial(run, asked)


@o.command(RecoverJob)
def recover(model: o.Model, out: o.Out, **given: Any) -> o.Work:
    """Fine-tune MODEL, a pruned checkpoint, on instructions or text.

    LoRA on all projections is trained and merged. The result is a checkpoint of the same shape and
    dtype, with its record kept.
    """
    job = make_job(RecoverJob, {"model": model, "out": out, **given})
    check_free(job)
    from nuteprune.jobs.recover import run_and_report

    return partial(run_and_report, job)


@o.command(Exporting)
def export(
    model: o.Model,
    to: Annotated[str, typer.Option(help="Format: gguf (llama.cpp) or onnx (ONNX Runtime).")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    **given: Any,
) -> o.Work:
    """Write MODEL, pruned or not, in another program's format."""
    asked = Exporting(model, to, at_home(out), **given)
    reads = [("model", model), ("entry", asked.family)]
    beside = data_files(asked.out) if to == "onnx" else ()
    check_file("--out", asked.out, reads, asked.overwrite, f"model.{to}", beside)
    from nuteprune.jobs.export import run

    return partial(run, asked)


@o.command()
def family(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder or config.json, or the name of a model type.")
    ],
    file: Annotated[
        Path | None, typer.Option("--family", help="Check this entry in place of proposing one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="YAML file to write the entry to.")] = None,
    overwrite: o.Overwrite = False,
) -> o.Work:
    """Propose an entry for a model type that is not listed.

    The entry is tried on a small model: the gates that hold with it are named.
    """
    from nuteprune.jobs.family import run

    return partial(run, model, file=file, out=out, overwrite=overwrite)


@o.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that nuteprune wrote.")],
) -> o.Work:
    """Show the layers, parameters and quality of a pruned checkpoint."""
    from nuteprune.jobs.inspect import run

    return partial(run, folder)


@o.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The --out folder of prune or recover, finished or not."
        ),
    ],
) -> o.Work:
    """Write RUN's report: one HTML page, and its plots as PNG.

    The page needs no network.
    """
    check_writable("RUN", folder)
    from nuteprune.console import Output
    from nuteprune.judge.report import PLOTS, write_report

    def work(output: Output) -> dict[str, Any]:
        page = write_report(folder)
        plots = sorted((page.parent / PLOTS).glob("*.png"))
        output.line(f"Report  {page}")
        output.line(f"Plots   {page.parent / PLOTS} ({', '.join(path.stem for path in plots)})")
        return {"report": str(page), "plots": [str(path) for path in plots]}

    return work


@o.command(VocabJob, but=VocabJob.NOT_HERE)
def vocab(
    model: o.Model,
    out: o.Out,
    keep: Annotated[
        str, typer.Option(help=f"Number of tokens to keep, such as 16384, {AUTO_MEANS}")
    ],
    **given: Any,
) -> o.Work:
    """Keep KEEP of MODEL's tokens: those that its texts need most.

    The 256 bytes are among them, so any text can still be spelled. Embedding and head are cut to
    these rows. The result is a stock checkpoint of the same class.
    """
    job = make_job(VocabJob, {"model": model, "out": out, **given})
    check_free(job)
    from nuteprune.jobs.vocab import run

    return partial(run, job, keep)


@o.command(Writing)
def write(
    model: o.Model,
    tokens: Annotated[int, typer.Option(help="Tokens to write, at least.")],
    out: Annotated[Path, typer.Option(help="File for the text, such as own.jsonl.")],
    **given: Any,
) -> o.Work:
    """Let MODEL write text of its own, for prune --own-text.

    After a stop, the same command goes on with the written part.
    """
    asked = Writing(model, tokens, out, **given)
    from nuteprune.jobs.write import run

    return partial(run, asked)
