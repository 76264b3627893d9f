"""The job of `demo`: the embedded model pruned on the embedded text, then compared with others."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nuteprune.console import Bars, Output, megabytes, millions
from nuteprune.data import demo as assets
from nuteprune.data.blocks import JUDGED
from nuteprune.data.specs import DEMO
from nuteprune.export.checkpoint import as_stored, assemble
from nuteprune.export.loading import in_dtype
from nuteprune.export.record import weights_size, write_pruned
from nuteprune.jobs.engines import Transformers
from nuteprune.jobs.folder import begun
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.judging import copies
from nuteprune.jobs.prune import Result, run, tell, whole
from nuteprune.jobs.prune_trainer import trainer_config
from nuteprune.jobs.sources import load_tokenizer, pick_dtype, stored_dtype
from nuteprune.jobs.speed import costs_for
from nuteprune.jobs.timing import for_report, measure
from nuteprune.judge.bench import PASSES, told
from nuteprune.judge.beside import print_beside
from nuteprune.judge.perplexity import mean, perplexities
from nuteprune.judge.run_files import read_samples, write_extra
from nuteprune.judge.work import Setting
from nuteprune.model.anatomy import Anatomy
from nuteprune.run_folder import RUN, SPEED
from nuteprune.train.asked import SETTINGS
from nuteprune.train.setup import make_allocator
from nuteprune.train.targets import Prices, run_targets

DEFAULTS = {"max_steps": 60, "target_sparsity": 0.2}
MEMORY = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
"""The default batch in two parts, which need half of the memory for activations."""
FOLDER = Path("nuteprune-demo")
TIMED = Setting(batch_size=1, length=256, new_tokens=32)


def fetch(output: Output) -> None:
    """Have the model and the texts here, before anything else is looked at."""
    assets.model_folder(output.line)
    assets.documents(output.line)


def with_defaults(job: PruneJob) -> PruneJob:
    """Return a job with the demo's own defaults where nothing else is said."""
    defaults = dict(DEFAULTS)
    if SETTINGS.keys() & job.settings.keys():
        del defaults["target_sparsity"]
    if not MEMORY.keys() & job.settings.keys():
        defaults |= MEMORY
    job.settings = {**defaults, **job.settings}
    return job


def finished(job: PruneJob, output: Output) -> dict[str, Any] | None:
    """Prune, compare and print; returns the record with `one_shot` and what was measured."""
    result = run(with_defaults(job), output)
    if result is None:
        return None
    return result.plan if result.plan is not None else compare(job, result, output)


def free_folder(wanted: Path) -> Path:
    """Return the folder, or the first of its numbered siblings that is not taken."""
    folder, number = wanted, 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def begun_folder(wanted: Path) -> Path:
    """Return the newest of the folder and its numbered siblings that a run was begun in."""
    found = [x for x in wanted.parent.glob(f"{wanted.name}*") if begun(x)]
    return max(found, key=lambda x: (x / RUN).stat().st_mtime, default=wanted)


def compare(job: PruneJob, result: Result, output: Output) -> dict[str, Any]:
    """Print dense, one-shot and pruned model side by side, and answers of two of them."""
    out, record = list(result.records.items())[-1]
    gc.collect()  # make room for two models
    with tempfile.TemporaryDirectory() as folder, output.bars() as bars:
        plain = one_shot(job, result.scores, result.held_out, Path(folder), bars)
        engine = Transformers.asked(job.device, job.dtype)
        speed = measure([str(out.absolute()), DEMO], [TIMED], PASSES, engine, bars)
    print_table(record, plain, speed, output)
    print_beside(record, read_samples(job.out / RUN), output)
    output.line()
    write_extra(job.out / RUN, SPEED, {**speed, **for_report(speed)})
    output.line(f"Saved   {out} (nuteprune inspect {out} shows its layers)")
    tell(job, result, output)
    return {
        "out": str(out),
        **record,
        "one_shot": plain["perplexity"]["after"],
        "decode_tokens_per_second": decoded(speed),
        "speedup": result.speedups.get(out, speed["settings"][0]["speedup"]),
    }


def one_shot(
    job: PruneJob,
    scores: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    out: Path,
    bars: Bars,
) -> dict[str, Any]:
    """Write what the first ranking alone gives: nothing trained, nothing re-fitted."""
    model = whole(job)
    stored = stored_dtype(model)
    anatomy = Anatomy(model)
    config = trainer_config(job, out)
    config.costs = costs_for(job, config, model, bars)
    allocator = make_allocator(anatomy, config)
    target = run_targets(allocator, config, Prices.of(anatomy, stored, config))[-1]
    masks = allocator.masks(allocator.shape(scores, target.goal), scores)
    params = {"before": anatomy.parameters(), "blocks_before": allocator.budget.before}
    small, shape = assemble(anatomy, masks)
    computed = pick_dtype(job.dtype, job.device)
    judged = in_dtype(small, computed)
    after = perplexities(judged, held_out, batch_size=JUDGED)
    copied = copies(judged, load_tokenizer(job.model, job.trust_remote_code))
    return write_pruned(
        out,
        as_stored(small, stored),
        None,
        params,
        target=target.sparsity,
        before=allocator.budget.shape,
        after=shape,
        perplexity={"before": {}, "after": after},
        copying={"after": copied.percent} if copied else {},
    )


def decoded(speed: Mapping[str, Any]) -> dict[str, float]:
    """Return the median rates of decoding, in tokens per second."""
    ours, dense = speed["settings"][0]["models"].values()
    rates = {"dense": dense, "NutePrune": ours}
    return {name: found["decode_tokens_per_second"]["median"] for name, found in rates.items()}


def print_table(
    record: dict[str, Any], plain: dict[str, Any], speed: Mapping[str, Any], output: Output
) -> None:
    """Print parameters, size, held-out perplexity and speed of the three models."""
    sources = list(record["perplexity"]["before"])
    dense_size = weights_size(assets.model_folder())
    ratios = speed["settings"][0]["speedup"]
    phases = ("prefill", "decode")
    times = {"dense": ["1 x"] * 2, "NutePrune": [told(ratios[phase]) for phase in phases]}

    def row(name: str, of: dict[str, Any], when: str, size: int) -> list[str]:
        ppl, copied = of["perplexity"][when], of.get("copying", {}).get(when)
        cells = [name, millions(of["params"][when]), megabytes(size)]
        cells += [f"{ppl[s]:.2f}" for s in sources]
        return [
            *cells,
            f"{mean(ppl):.2f}",
            "-" if copied is None else f"{copied:.0f} %",
            *times.get(name, ["-"] * 2),
        ]

    def written(name: str, of: dict[str, Any]) -> list[str]:
        return row(name, of, "after", of["bytes_on_disk"])

    output.line()
    output.table(
        f"Sparsity {record['sparsity']:.2%}; perplexity on held-out text; copied from context",
        ["", "params", "on disk", *sources, "mean", "copies", *phases],
        [
            row("dense", record, "before", dense_size),
            written("one-shot", plain),
            written("NutePrune", record),
        ],
    )
    ratio = mean(record["perplexity"]["after"]) / mean(record["perplexity"]["before"])
    output.line(
        f"{record['total_sparsity']:.1%} of all parameters are gone; perplexity is {ratio:.2f} x "
        f"that of the dense model; {record['seconds']:.0f} s"
    )
    bounds = ", ".join(f"{x} {ratios[x]['bound']:.2f} x" for x in phases)
    output.line(
        f"Speed beside the dense model: medians of {speed['repeats']} pairs of passes, batch 1, "
        f"{TIMED.length} + {TIMED.new_tokens} tokens. Bound: {bounds}"
    )
    output.line()
