"""The job of `demo`: the embedded model pruned on the embedded text, then compared with others."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from nuteprune.console import Output
from nuteprune.data import demo as assets
from nuteprune.gates.costs import PHASES
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.prune import finish, run
from nuteprune.jobs.show import print_result
from nuteprune.jobs.speed import measure_beside
from nuteprune.judge.bench import say_ratio
from nuteprune.judge.work import Workload
from nuteprune.train.asked import SETTINGS

MINUTES = 5
"""How long it takes where nothing else is said; on slow machines longer."""
COMPARED = 18
"""Time to compare speeds, in blocks that are taught."""
MEMORY = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
"""The default batch in two parts, which need half of the memory for activations."""
TIMED = Workload(batch_size=1, length=256, new_tokens=16)


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


def run_and_report(job: PruneJob, output: Output) -> dict[str, Any] | None:
    """Prune, compare and print; returns the record with what was measured."""
    assets.model_folder(output.line)  # fetched before anything else
    assets.documents(output.line)
    result = run(with_defaults(job), output)
    if result is None:
        return None
    return result.plan if result.plan is not None else compare(job, result.records, output)


def compare(job: PruneJob, records: dict[Path, dict[str, Any]], output: Output) -> dict[str, Any]:
    """Print dense and pruned model side by side, their speed, and answers of both."""
    out, record = list(records.items())[-1]
    gc.collect()  # make room for two models
    speed = measure_beside(job, out, TIMED, output)
    ratios = speed["settings"][0]["speedup"]
    said = (f"{x} {say_ratio(ratios[x])} (bound {ratios[x]['bound']:.2f} x)" for x in PHASES)
    output.line()
    output.line(f"Speed   {', '.join(said)}; median of {speed['repeats']} pairs of passes")
    print_result(out, record, output, answers=True)
    finish(job, records, output)
    (timed,) = speed["settings"]
    ours, dense = (x["decode_tokens_per_second"]["median"] for x in timed["models"].values())
    return {
        "out": str(out),
        **record,
        "decode_tokens_per_second": {"dense": dense, "NutePrune": ours},
        "speedup": record.get("speedup", timed["speedup"]),
    }
