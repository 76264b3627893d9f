"""The commands: each turns its options into what a job is asked to do, and prints its result.

What computes is loaded when the options are known to be right: help and refusals do without.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nuteprune.cli import options as o
from nuteprune.data.specs import DEMO
from nuteprune.errors import UserError
from nuteprune.jobs.folder import DEMOS, begun_folder, free_folder
from nuteprune.jobs.guard import check_free, check_writable
from nuteprune.jobs.job import PruneJob, RecoverJob, VocabJob
from nuteprune.jobs.options import Benchmark, Evaluation, Writing
from nuteprune.jobs.settings import check_target, make_job
from nuteprune.train.asked import value_of
from nuteprune.train.prune_settings import PruneSettings

if TYPE_CHECKING:
    from nuteprune.console import Output

_NOT_ASKED = (
    *("out", "data", "eval_data", "text_column", "shares", "trust_remote_code", "vocab"),
    *("device", "bits", "offload", "resume", "overwrite", "dry_run"),
)
"""Settings of `prune` that `plan` does not offer."""


def _output(as_json: bool) -> Output:
    from nuteprune.console import Output  # rich takes its time

    return Output(as_json)


@o.with_options(
    PruneSettings,
    PruneJob,
    but=("data", "eval_data", "text_column", "trust_remote_code", "family"),
)
def demo(
    out: o.OptionalOut = None,
    config: o.Config = None,
    assignments: o.Set = None,
    as_json: o.Json = False,
    **given: Any,
) -> None:
    """Prune SmolLM2-135M-Instruct on real text; no arguments needed.

    Without --out the result is in ./nuteprune-demo, or -2, -3, ... where that is taken;
    with --overwrite always in ./nuteprune-demo.
    """
    pick = begun_folder if given["resume"] else free_folder
    folder = DEMOS if given["overwrite"] else pick(DEMOS)
    asked = {"model": DEMO, "out": folder if out is None else out, **given}
    job = make_job(PruneJob, PruneSettings, asked, config, assignments or ())
    check_free(job)
    from nuteprune.jobs.demo import fetch, finished

    output = _output(as_json)
    fetch(output)
    output.result(finished(job, output))


@o.with_options(PruneSettings, PruneJob, but=_NOT_ASKED)
def plan(
    model: Annotated[
        str,
        typer.Argument(help="Hub id, folder with a config.json, config.json, or 'demo'."),
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
    as_json: o.Json = False,
    **given: Any,
) -> None:
    """Say what memory and time it would take to prune MODEL.

    Phase by phase, from the config alone: no weights are read.
    """
    if devices < 1 or not all(x is None or x > 0 for x in (tflops, bandwidth)):
        raise UserError("--devices, --tflops and --bandwidth must be above 0")
    if devices > 1 and device_memory is None:
        raise UserError(f"--devices {devices}: say what memory each has with --device-memory")
    asked = {"model": model, "out": Path("unused"), **given}
    job = make_job(PruneJob, PruneSettings, asked, config, assignments or ())
    memory = None
    if device_memory is not None:
        memory = value_of("memory", device_memory, "--device-memory")
    rate = None if tflops is None else tflops * 1e12
    reading = None if bandwidth is None else bandwidth * 1e9
    from nuteprune.jobs.plan import Asked, run

    output = _output(as_json)
    output.result(run(job, Asked(devices, memory, rate, reading), output))


@o.with_options(PruneSettings, PruneJob)
def prune(
    model: o.Model,
    out: o.Out,
    config: o.Config = None,
    assignments: o.Set = None,
    as_json: o.Json = False,
    **given: Any,
) -> None:
    """Make MODEL smaller by SPARSITY, guided by text from DATA.

    --dry-run says first which shapes can be had, and what time and memory the run would take.
    """
    asked = {"model": model, "out": out, **given}
    job = make_job(PruneJob, PruneSettings, asked, config, assignments or ())
    check_target(job)
    check_free(job)
    from nuteprune.jobs.prune import finished

    output = _output(as_json)
    result = finished(job, output)
    output.result(None if result is None else result.summary())


@o.with_options(Evaluation, defaults=True)
def evaluate(model: o.Model, as_json: o.Json = False, **given: Any) -> None:
    """Measure how good MODEL is: perplexity, copying, answers, tasks.

    Perplexity is measured on text, copying on random tokens. With --against also whether greedy
    answers loop, and what is lost on tokens that need their context. Tasks are zero-shot unless
    --fewshot says otherwise. MODEL may also be a trainer checkpoint, OUT/run/checkpoint-N. Without
    --data, --protocol and --tasks the text is the held-out part of the demo's.
    """
    asked = Evaluation(model, **o.given(given))
    from nuteprune.jobs.evaluate import run

    output = _output(as_json)
    output.result(run(asked, output))


@o.with_options(Benchmark, defaults=True)
def bench(model: o.Model, as_json: o.Json = False, **given: Any) -> None:
    """Measure how fast MODEL reads and writes, and its memory.

    Prompts are random tokens. Each model has a process of its own; with --against they take turns,
    so that other work of the machine slows both alike.
    """
    asked = Benchmark(model, **o.given(given))
    from nuteprune.jobs.bench import run

    output = _output(as_json)
    output.result(run(asked, output))


@o.with_options(RecoverJob)
def recover(model: o.Model, out: o.Out, as_json: o.Json = False, **given: Any) -> None:
    """Fine-tune MODEL, a pruned checkpoint, on instructions or text.

    LoRA on all projections is trained and merged. The result is a checkpoint of the same shape and
    dtype, with its record kept.
    """
    job = make_job(RecoverJob, None, {"model": model, "out": out, **given})
    check_free(job)
    from nuteprune.jobs.recover import finished

    output = _output(as_json)
    output.result(finished(job, output))


def family(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder or config.json, or the name of a model type.")
    ],
    file: Annotated[
        Path | None, typer.Option("--family", help="Check this entry in place of proposing one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="YAML file to write the entry to.")] = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Propose an entry for a model type that is not listed.

    The entry is tried on a small model: the gates that hold with it are named.
    """
    from nuteprune.jobs.family import run

    output = _output(as_json)
    output.result(run(model, output, file, out, overwrite))


def inspect(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that nuteprune wrote.")],
    as_json: o.Json = False,
) -> None:
    """Show the layers, parameters and quality of a pruned checkpoint."""
    from nuteprune.jobs.inspect import run

    output = _output(as_json)
    output.result(run(folder, output))


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The --out folder of prune or recover, finished or not."
        ),
    ],
    as_json: o.Json = False,
) -> None:
    """Write RUN's report: one HTML page, and its plots as PNG.

    The page needs no network.
    """
    check_writable("RUN", folder)
    from nuteprune.jobs.reproduce import again
    from nuteprune.judge.report import PLOTS, write_report

    output = _output(as_json)
    page = write_report(folder, again)
    plots = sorted((page.parent / PLOTS).glob("*.png"))
    output.line(f"Report  {page}")
    output.line(f"Plots   {page.parent / PLOTS} ({', '.join(path.stem for path in plots)})")
    output.result({"report": str(page), "plots": [str(path) for path in plots]})


@o.with_options(VocabJob, but=VocabJob.NOT_HERE)
def vocab(
    model: o.Model,
    out: o.Out,
    keep: Annotated[
        str,
        typer.Option(
            help="Number of tokens to keep, such as 16384, or 'auto': the fewest that cost at most "
            "1 % on held-out DATA."
        ),
    ],
    as_json: o.Json = False,
    **given: Any,
) -> None:
    """Keep KEEP of MODEL's tokens: those that its texts need most.

    The 256 bytes are among them, so any text can still be spelled. Embedding and head are cut to
    these rows. The result is a stock checkpoint of the same class.
    """
    job = make_job(VocabJob, None, {"model": model, "out": out, **given})
    check_free(job, resumes=False)
    from nuteprune.jobs.vocab import run

    output = _output(as_json)
    output.result(run(job, keep, output))


@o.with_options(Writing, defaults=True)
def write(
    model: o.Model,
    tokens: Annotated[int, typer.Option(help="Tokens to write, at least.")],
    out: Annotated[Path, typer.Option(help="File for the text, such as own.jsonl.")],
    as_json: o.Json = False,
    **given: Any,
) -> None:
    """Let MODEL write text of its own, for prune --own-text.

    After a stop, the same command goes on with the written part.
    """
    asked = Writing(model, tokens, out, **o.given(given))
    from nuteprune.jobs.write import run

    output = _output(as_json)
    output.result(run(asked, output))
