"""The job of `demo`: the embedded model pruned on the embedded text, then compared with others."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nuteprune.console import Output, megabytes
from nuteprune.data import demo as assets
from nuteprune.export.record import weights_size
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.prune import finish, run
from nuteprune.jobs.show import print_beside, print_end
from nuteprune.jobs.speed import measure_beside
from nuteprune.judge.bench import say_ratio
from nuteprune.judge.run_files import read_samples
from nuteprune.judge.work import Workload
from nuteprune.run_folder import RUN
from nuteprune.train.asked import SETTINGS

MINUTES = 5
"""How long it takes where nothing else is said; on slow machines longer."""
COMPARED = 1.5
"""Time to compare speeds, as a multiple of judging the dense model."""
MEMORY = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
"""The default batch in two parts, which need half of the memory for activations."""
TIMED = Workload(batch_size=1, length=256, new_tokens=32)


def with_defaults(job: PruneJob) -> PruneJob:
    """Return a job with the demo's own defaults for what is not given."""
    target = {} if SETTINGS.keys() & job.settings.keys() else {"target_sparsity": 0.2}
    memory = {} if MEMORY.keys() & job.settings.keys() else MEMORY
    job.settings = {**target, **memory, **job.settings}
    has_steps = "max_steps" in job.settings or job.settings.get("progressive")
    job.after, job.may_exceed = COMPARED, job.minutes is None
    if job.minutes is None and not has_steps:
        job.minutes = MINUTES
    return job


def finished(job: PruneJob, output: Output) -> dict[str, Any] | None:
    """Prune, compare and print; returns the record with what was measured."""
    assets.model_folder(output.line)  # fetched before anything else
    assets.documents(output.line)
    result = run(with_defaults(job), output)
    if result is None:
        return None
    return result.plan if result.plan is not None else compare(job, result.records, output)


def compare(job: PruneJob, records: dict[Path, dict[str, Any]], output: Output) -> dict[str, Any]:
    """Print dense and pruned model side by side, and answers of both."""
    out, record = list(records.items())[-1]
    gc.collect()  # make room for two models
    speed = measure_beside(job, out, TIMED, output)
    print_table(record, speed, output)
    print_beside(record, read_samples(out / RUN), output)
    output.line()
    print_end(out, record, output)
    finish(job, records, output)
    (timed,) = speed["settings"]
    ours, dense = (x["decode_tokens_per_second"]["median"] for x in timed["models"].values())
    return {
        "out": str(out),
        **record,
        "decode_tokens_per_second": {"dense": dense, "NutePrune": ours},
        "speedup": record.get("speedup", timed["speedup"]),
    }


def print_table(record: dict[str, Any], speed: Mapping[str, Any], output: Output) -> None:
    """Print size, held-out perplexity, copying and speed of both models."""
    sources = list(record["perplexity"]["before"])
    ratios = speed["settings"][0]["speedup"]
    phases = ("prefill", "decode")
    gains = [say_ratio(ratios[x]) for x in phases]

    def row(name: str, when: str, size: int, times: list[str]) -> list[str]:
        ppl, copied = record["perplexity"][when], record.get("copying", {}).get(when)
        return [
            name,
            megabytes(size),
            *(f"{ppl[s]:.2f}" for s in sources),
            "-" if copied is None else f"{copied:.0f} %",
            *times,
        ]

    output.line()
    output.table(
        f"Sparsity {record['sparsity']:.2%}; perplexity on held-out text; copied from context",
        ["", "on disk", *sources, "copies", *phases],
        [
            row("dense", "before", weights_size(assets.model_folder()), ["1 x"] * 2),
            row("NutePrune", "after", record["bytes_on_disk"], gains),
        ],
    )
    bounds = ", ".join(f"{x} {ratios[x]['bound']:.2f} x" for x in phases)
    output.line(
        f"Speed: median of {speed['repeats']} pairs of passes, {TIMED.length} + "
        f"{TIMED.new_tokens} tokens. Bound: {bounds}"
    )
    output.line()
