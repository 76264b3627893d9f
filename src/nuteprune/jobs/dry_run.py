"""What a dry run says: which shapes can be had, and what each phase of the run will take."""

from __future__ import annotations

import copy
from typing import Any

from nuteprune.console import Output, duration, megabytes, millions
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.planned import Rate, entry, in_bits, offloaded, print_phases, sharded
from nuteprune.jobs.show import told
from nuteprune.jobs.sources import stored_dtype
from nuteprune.jobs.text import own_share
from nuteprune.memory import peak, reset_peak
from nuteprune.model.packed import is_packed
from nuteprune.train.calibration import refits, stops_before
from nuteprune.train.extrapolate import Unplanned
from nuteprune.train.kernels import on_cpu
from nuteprune.train.phases import FORMULA, Phase, Run
from nuteprune.train.step_cost import seconds_per_step
from nuteprune.train.trainer import NutePruneTrainer

MEASURED = "measured"
BYTES_OF_ADAM = 8
"""Per trained parameter: two moments in fp32, which a single step does not make."""


def print_dry_run(
    job: PruneJob, trainer: NutePruneTrainer, writing: float, judged: int, output: Output
) -> dict[str, Any]:
    """Print which shapes can be had, and what the run will take; return both.

    Args:
        job: the job.
        trainer: a run that has not begun.
        writing: the seconds that the model writes text, reckoned.
        judged: blocks of text that models are judged by.
        output: prints.
    """
    found = _reached(trainer, output)
    reset_peak()  # loading and timing what is written may have held more
    step = seconds_per_step(trainer)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    memory = peak() + trained * BYTES_OF_ADAM
    try:
        taken = _planned(job, trainer, writing, judged, step)
        print_phases(taken["phases"], _where(trainer), output)
        said = "all phases by the rate of that step"
    except Unplanned as error:
        output.line(f"Note    {error}")
        taken = {"seconds": _reckoned(trainer, writing, step)}
        said = "scoring and re-fit as so many steps"
    output.line(
        f"Cost    {step:.1f} s a step and {megabytes(memory)} of memory in it, by doing one; "
        f"{duration(taken['seconds'])} in all, {said}"
    )
    output.line("Dry run no model was written.")
    return {
        **found,
        "seconds_per_step": step,
        "seconds_writing": writing,
        "memory_bytes": memory,
        **taken,
    }


def _reached(trainer: NutePruneTrainer, output: Output) -> dict[str, Any]:
    """Print what each target comes to, in all words, and return it."""
    budget, prices = trainer.allocator.budget, trainer.prices
    scores = trainer.allocator.chance_scores()
    shapes = [trainer.allocator.shape(scores, target.goal) for target in trainer.goals]
    counts = [int(prices.params.total(shape)) for shape in shapes]
    sizes = [int(prices.size.total(shape)) for shape in shapes]
    caches = [prices.cache(shape) for shape in shapes]
    active = [of["active_after"] for shape in shapes if (of := prices.of_a_token(shape))]
    faster = [x for shape in shapes if (x := prices.speedup(shape)) is not None]
    for i, (target, shape) in enumerate(zip(trainer.goals, shapes, strict=True)):
        output.line(
            f"Reach   {told(target)} asked, {budget.sparsity(shape):.3%} gone: "
            f"{millions(counts[i])} parameters"
            f"{f', {millions(active[i])} of them active per token' if active else ''}, "
            f"{megabytes(sizes[i])} on disk, and {megabytes(caches[i])} of KV cache "
            f"for {prices.sequences} x {prices.context} tokens"
            + (f"; expected to be {faster[i]:.2f} x as fast" if faster else "")
        )
    return {
        "targets": list(trainer.targets),
        "sparsity": [budget.sparsity(shape) for shape in shapes],
        "asked": [{"kind": x.asked.kind, "value": x.asked.value} for x in trainer.goals],
        "parameters": counts,
        **({"active_parameters": active} if active else {}),
        "bytes": sizes,
        "cache_bytes": caches,
        **({"expected_speedup": faster} if faster else {}),
        "context": prices.context,
        "sequences": prices.sequences,
        "shape": [shape.to_dict() for shape in shapes],
    }


def _planned(
    job: PruneJob, trainer: NutePruneTrainer, writing: float, judged: int, step: float
) -> dict[str, Any]:
    """Return what phases take by a plan, at the rate of a step of `step` seconds.

    Raises:
        Unplanned: if the model cannot be gone through without data.
    """
    model, args, dtype = trainer.anatomy.model, copy.copy(trainer.args), trainer.computed_dtype
    args.sharded = args.offload = False  # what these save is by formula
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    packed = bool(job.bits or trainer.args.sharded)
    whole = trainer.args.device.type == "cpu" and not packed
    stored = stored_dtype(model) if whole else None
    own = own_share(job, trainer.args.sharded)
    run = Run.of(config, args, job.length, dtype, type(model), judged, stored, own, packed)
    phases = run.phases()
    timed = next((x for x in phases if x.steps), None)
    plain = timed.need.flops / timed.steps / step if timed else None
    rate = Rate.measured(dtype, trainer.args.device.type, plain)
    peaks = _peaks(job, trainer, run, phases)
    entries = [entry(phase, rate, peaks[phase.name]) for phase in phases]
    for x in entries:
        if packed or trainer.args.offload:  # so is what they save
            x |= {"how": FORMULA}
        if x["phase"] == "writing text":
            x |= {"seconds": writing, "how": MEASURED}
    return {"phases": entries, "seconds": sum(x["seconds"] for x in entries)}


def _peaks(
    job: PruneJob, trainer: NutePruneTrainer, run: Run, phases: list[Phase]
) -> dict[str, float]:
    """Return the bytes that each phase holds where the run's model is."""
    peaks = {x.name: x.need.peak for x in phases}
    after = ("finalize", "saving", "judging the results")  # nothing of the dense model is left
    inside = {k: v for k, v in peaks.items() if k not in after}
    if trainer.args.sharded:
        return peaks | sharded(run, inside, trainer.args.world_size)
    if job.bits:
        return peaks | in_bits(run, inside, job.bits)
    if run.stored is not None:
        return on_cpu({x.name: x.need for x in phases})
    return peaks | (offloaded(run, inside) if trainer.args.offload else {})


def _where(trainer: NutePruneTrainer) -> str:
    on_cpu = trainer.args.device.type == "cpu"
    return "beside Python and files" if on_cpu else "peak on a device"


def _reckoned(trainer: NutePruneTrainer, writing: float, step: float) -> float:
    """Return about how long a run takes that cannot be planned."""
    args, anatomy, kinds = trainer.args, trainer.anatomy, trainer.allocator.constraints.kinds
    asked = (args, kinds, is_packed(anatomy.model))
    rounds = 1 + len(stops_before(trainer.targets[-1], *asked))
    # A scored or re-fitted block costs most of a step's share of one.
    blocks = args.scored_blocks * rounds + args.refit_blocks * refits(trainer.targets, *asked)
    each = args.train_batch_size * args.gradient_accumulation_steps
    return writing + step * (args.max_steps + blocks / each)
