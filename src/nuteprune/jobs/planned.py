"""What a run would take, as dry runs tell it; `plan` tells it with the same rates and tables."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nuteprune.console import Output, duration, megabytes, millions
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.prune_run import seconds_writing, share_to_write
from nuteprune.jobs.show import describe_target
from nuteprune.memory import peak, reset_peak
from nuteprune.plan.need import Unplanned, on_cpu
from nuteprune.plan.phases import FORMULA, Phase, Plan
from nuteprune.plan.trial import BESIDE, seconds_per_step
from nuteprune.run import Run
from nuteprune.stages.score import stops_before

BYTES_OF_ADAM = 8
"""Per trained parameter: two moments in fp32, which a single step does not make."""
HELD = {8: 8, 4: 4.5}
"""Bits that a weight takes: NF4 has a scale in fp32 for each 64 of them."""
MEASURED_FOR = 0.3
"""Seconds that a rate is measured for."""


def print_dry_run(job: PruneJob, run: Run, output: Output) -> dict[str, Any]:
    """Print which shapes can be had, and what the run will take; return both.

    Args:
        job: the job.
        run: one that has not begun.
        output: prints.
    """
    found = _reached(run, output)
    trainer, args = run.first, run.args
    # Timed on the first positions of what the model writes.
    writing = seconds_writing(run, run.text.to_write) if run.text.to_write else 0.0
    step = memory = None
    if args.max_steps:
        reset_peak()  # loading and timing what is written may have held more
        step = seconds_per_step(trainer)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        memory = peak() + trained * BYTES_OF_ADAM
    try:
        taken = _planned(job, run, writing, step)
        on_cpu = args.device.type == "cpu"
        where = "beside Python and files" if on_cpu else "peak on a device"
        print_phases(taken["phases"], where, output)
    except Unplanned as error:
        output.line(f"Note    {error}")
        taken = {"seconds": None if step is None else _reckoned(run, writing, step)}
    seconds = taken["seconds"]
    said = "not known" if seconds is None else f"{duration(seconds)} in all"
    if step is None or memory is None:
        said += ", by the rate of products alone" if "phases" in taken else ""
        said += ": no step was run"
    else:
        said += ", by the rate of that step" if "phases" in taken else ", the rest as so many steps"
        one = f"{step:.1f} s a step and {megabytes(memory)} of memory in it, by doing one"
        said = f"{one}; {said}"
    output.line(f"Cost    {said}")
    output.line("Dry run no model was written.")
    cost = {"seconds_per_step": step, "seconds_writing": writing, "memory_bytes": memory}
    return {**found, **cost, **taken}


def _reached(run: Run, output: Output) -> dict[str, Any]:
    """Print what each target comes to in every unit, and return it."""
    allocator, prices = run.model.allocator, run.model.prices
    budget, scores = allocator.budget, allocator.chance_scores()
    shapes = [allocator.shape(scores, target.goal) for target in run.targets]
    counts = [int(prices.params.total(shape)) for shape in shapes]
    sizes = [int(prices.size.total(shape)) for shape in shapes]
    caches = [prices.cache(shape) for shape in shapes]
    active = [of["active_after"] for shape in shapes if (of := prices.of_a_token(shape))]
    faster = [x for shape in shapes if (x := prices.speedup(shape)) is not None]
    for i, (target, shape) in enumerate(zip(run.targets, shapes, strict=True)):
        output.line(
            f"Reach   {describe_target(target)} asked, {budget.sparsity(shape):.3%} gone: "
            f"{millions(counts[i])} parameters"
            f"{f', {millions(active[i])} of them active per token' if active else ''}, "
            f"{megabytes(sizes[i])} on disk, and {megabytes(caches[i])} of KV cache "
            f"for {prices.sequences} x {prices.context} tokens"
            + (f"; expected to be {faster[i]:.2f} x as fast" if faster else "")
        )
    return {
        "targets": [target.sparsity for target in run.targets],
        "sparsity": [budget.sparsity(shape) for shape in shapes],
        "asked": [{"kind": x.asked.kind, "value": x.asked.value} for x in run.targets],
        "parameters": counts,
        **({"active_parameters": active} if active else {}),
        "bytes": sizes,
        "cache_bytes": caches,
        **({"expected_speedup": faster} if faster else {}),
        "context": prices.context,
        "sequences": prices.sequences,
        "shape": [shape.to_dict() for shape in shapes],
    }


def _planned(job: PruneJob, run: Run, writing: float, step: float | None) -> dict[str, Any]:
    """Return what stages take by a plan, at the rate of a step of `step` seconds.

    Raises:
        Unplanned: if the model cannot be gone through without data.
    """
    model, args, origin = run.model.anatomy.model, copy.copy(run.args), run.model.origin
    args.sharded = args.offload = False  # what these save is by formula
    args.unlikelihood *= run.first.reads_own_answers
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    formula = bool(job.bits or run.args.sharded)
    whole = args.device.type == "cpu" and not formula
    plan = Plan.of(
        config,
        args,
        job.length,
        origin.computed_dtype,
        judged=sum(len(x) for x in run.held_out.values()),
        stored=origin.stored_dtype if whole else None,
        own=share_to_write(job),
        packed=bool(job.bits),
    )
    phases = plan.phases()
    timed = next((x for x in phases if x.steps), None)
    plain = timed.need.flops / timed.steps / step if timed and step else None
    rate = Rate.measured(origin.computed_dtype, args.device.type, plain)
    peaks = _peaks(job, run, plan, phases)
    entries = [entry(phase, rate, peaks[phase.name]) for phase in phases]
    for x in entries:
        if formula or run.args.offload:  # so is what they save
            x |= {"how": FORMULA}
        if x["phase"] == "write":
            x |= {"seconds": writing, "how": "measured"}
        if x["phase"] == "judge" and step:  # answers and context are in no plan
            x["seconds"] += BESIDE * len(run.targets) * step / run.args.sequences_per_step
        if x["phase"] == "teach" and timed and step:  # what is read in it is in a step's time
            x |= {"seconds": step * timed.steps}
    return {"phases": entries, "seconds": sum(x["seconds"] for x in entries)}


def _peaks(job: PruneJob, run: Run, plan: Plan, phases: Sequence[Phase]) -> dict[str, float]:
    """Return each phase's bytes on the run's device."""
    peaks = {x.name: x.need.peak for x in phases}
    inside = {k: v for k, v in peaks.items() if k not in ("slice", "save")}  # of the dense model
    if run.args.sharded:
        return peaks | sharded(plan, inside, run.args.world_size)
    if job.bits:
        return peaks | in_bits(plan, inside, job.bits)
    if plan.stored is not None:
        return on_cpu({x.name: x.need for x in phases})
    return peaks | (offloaded(plan, inside) if run.args.offload else {})


def _reckoned(run: Run, writing: float, step: float) -> float:
    """Return about how long a run takes that cannot be planned."""
    args = run.args
    rounds = args.tried and run.model.can_try_cuts
    stops = len(stops_before(run.targets[-1].sparsity)) * rounds
    # A scored or refitted block costs most of a step's share of one.
    refits = stops + len(run.targets)
    blocks = args.scored_blocks * (1 + stops) + args.refit_blocks * refits
    each = args.train_batch_size * args.gradient_accumulation_steps
    return writing + step * (args.max_steps * len(run.targets) + blocks / each)


@dataclass(frozen=True)
class Rate:
    """Rates of the machine, per second.

    Args:
        plain: floating-point operations in the dtype of the run.
        fine: those in fp32 and finer, such as the inverses of scoring and refit.
        read: bytes that are read of memory; None: not known, and not counted.
    """

    plain: float
    fine: float
    read: float | None = None

    @classmethod
    def measured(cls, dtype: torch.dtype, device: str, plain: float | None = None) -> Rate:
        """Measure on a device the rates that are not given, for a run in `dtype`."""
        plain = plain or measured_rate(dtype, device)
        fine = plain if dtype == torch.float32 else measured_rate(torch.float32, device)
        return cls(plain, fine, measured_reading(device))

    def seconds(self, phase: Phase) -> float:
        """Return how long a phase takes."""
        need = phase.need
        reading = phase.read / self.read if self.read else 0
        return (need.flops - need.fine) / self.plain + need.fine / self.fine + reading


def measured_rate(dtype: torch.dtype, device: str) -> float:
    """Return the floating-point operations a second of a product of matrices on a device."""
    size = 1024 if device == "cpu" else 8192  # a launch takes longer than a small product
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _fastest(lambda: (a @ a)[0, 0])


def measured_reading(device: str) -> float:
    """Return the bytes a second that a sum of many numbers reads on a device."""
    a = torch.ones(2 ** (24 if device == "cpu" else 28), device=device)
    return a.nbytes / _fastest(a.sum)


def _fastest(act: Callable[[], Tensor]) -> float:
    """Return the seconds of the fastest of several calls."""
    found: list[float] = []
    started = time.monotonic()
    while not found or time.monotonic() - started < MEASURED_FOR:
        begun = time.monotonic()
        float(act())
        found.append(time.monotonic() - begun)
    return min(found)


def entry(phase: Phase, rate: Rate, peak: float) -> dict[str, Any]:
    """Return what JSON says of a phase, which holds `peak` bytes."""
    return {
        "phase": phase.name,
        "peak_bytes": round(peak),
        "flops": phase.need.flops,
        "seconds": rate.seconds(phase),
        "how": phase.how,
    }


def tera(flops: float) -> str:
    """Return operations in 10^12, as text."""
    return f"{flops / 1e12:,.{0 if flops >= 1e13 else 2}f}"


def print_phases(entries: Sequence[Mapping[str, Any]], where: str, output: Output) -> None:
    """Print phases as a table; `where` says where their peaks are."""
    rows = [
        [
            x["phase"],
            megabytes(x["peak_bytes"]),
            tera(x["flops"]),
            duration(x["seconds"]),
            x["how"],
        ]
        for x in entries
    ]
    output.table("What each phase takes", ["phase", where, "TFLOP", "time", "how"], rows)


def sharded(plan: Plan, peaks: Mapping[str, float], count: int) -> dict[str, float]:
    """Return peaks of phases on a device that shares sharded weights with others."""
    sizes = plan.sizes
    gathered = 2 * sizes.layer + sizes.outside
    saved = sizes.weights - sizes.weights / count - gathered
    return _without(plan, peaks, saved, plan.refitted / count, sum(plan.beside) / count)


def in_bits(plan: Plan, peaks: Mapping[str, float], bits: int) -> dict[str, float]:
    """Return peaks of phases on a device where projections are held in this many bits."""
    held = HELD[bits] / 8 / plan.dtype.itemsize
    return _without(plan, peaks, plan.sizes.projections * (1 - held))


def offloaded(plan: Plan, peaks: Mapping[str, float]) -> dict[str, float]:
    """Return peaks of phases on a device that has one layer at a time."""
    sizes = plan.sizes
    # Room of two: refitted weights are beside the teacher's.
    there = sizes.outside + 2 * sizes.layer
    beside = there * len(plan.beside)
    return _without(plan, peaks, sizes.weights - there, beside=beside)


def _without(
    plan: Plan,
    peaks: Mapping[str, float],
    saved: float,
    refitted: float = 0,
    beside: float = 0,
) -> dict[str, float]:
    """Return peaks of phases without what is saved.

    Of refitted weights, and of models beside the one that is judged, some bytes may stay.
    """
    stages = ("refit", "teach", *["score"][: plan.stops])
    own = dict.fromkeys(stages, plan.refitted - refitted) | {"judge": sum(plan.beside) - beside}
    return {k: v - saved - own.get(k, 0) for k, v in peaks.items()}
