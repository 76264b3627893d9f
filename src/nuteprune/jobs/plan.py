"""The job of `plan`: what a run would take, from a config alone, and which settings make it fit."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from nuteprune.console import Output, dtype_name, duration, megabytes, millions
from nuteprune.data.tokens import check_positions
from nuteprune.errors import UserError
from nuteprune.export.loading import load_config
from nuteprune.files import at_home
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.planned import Rate, entry, in_bits, offloaded, print_phases, sharded, tera
from nuteprune.jobs.prune_run import share_to_write, trainer_config
from nuteprune.jobs.sources import locate, pick_device, pick_dtype, read_config, use_family
from nuteprune.model.lookup import family_named, wrapper_of
from nuteprune.plan.phases import FORMULA, NOT_SHARED, ON_CPUS, SIMULATED, Phase, Plan

SPARE = 0.95
"""Share of a device's memory that a run may take; allocators and libraries have the rest."""
SLOWER = 4 / 3
"""Work of a step with activation checkpointing, as a multiple of one without."""


@dataclass(frozen=True)
class Devices:
    """The options of `plan` that are not the run's.

    Args:
        devices: how many there are.
        memory: bytes of each; None: not given.
        rate: floating-point operations a second; None: measured here.
        reading: bytes that are read a second; None: measured here, where `rate` is.
    """

    devices: int = 1
    memory: float | None = None
    rate: float | None = None
    reading: float | None = None


@dataclass(frozen=True)
class Variant:
    """Settings that take less memory.

    Args:
        settings: what to pass, in words of the command line.
        peaks: phase -> bytes on a device.
        factor: time of a step, as a multiple of the asked run's.
        how: whether the peaks are simulated or by formula.
    """

    settings: str
    peaks: Mapping[str, float]
    factor: float = 1.0
    how: str = SIMULATED


def run(job: PruneJob, asked: Devices, output: Output) -> dict[str, Any]:
    """Print what a run would take, and return it.

    Raises:
        UserError: for a config without the facts that a plan needs, settings that cannot work, or
            memory that cannot hold a single layer.
    """
    if job.vocab is not None:
        raise UserError("a plan counts all tokens: leave out vocab, or use prune --dry-run")
    use_family(job.family, job.model)
    config = config_of(job.model)
    check_positions(job.length, config)
    dtype = torch.bfloat16 if job.dtype == "auto" else pick_dtype(job.dtype, job.device)
    with tempfile.TemporaryDirectory() as scratch:
        args = trainer_config(replace(job, device="cpu"), Path(scratch))
        saving = {"sharded": args.sharded, "offload": args.offload, "bits": job.bits}
        if asked_for := [x for x, given in saving.items() if given]:
            raise UserError(
                f"a plan says by itself what {asked_for[0]} saves: use --device-memory, and "
                "--devices where there are several"
            )
        planned = Plan.of(config, args, job.length, dtype, own=share_to_write(job))
        layer = planned.sizes.layer
        if asked.memory is not None and layer > SPARE * asked.memory:
            raise UserError(
                f"a device of {megabytes(asked.memory)} cannot hold even one layer of {job.model}, "
                f"{megabytes(layer)} in {dtype_name(dtype)}; name devices with more memory"
            )
        phases = planned.phases()
        result = _taken(job, asked, planned, phases)
        if asked.memory is not None:
            result |= _choices(planned, phases, asked.devices, asked.memory)
    _print(result, planned, output)
    return result


def _taken(job: PruneJob, asked: Devices, planned: Plan, phases: Sequence[Phase]) -> dict[str, Any]:
    """Return what a run takes as it is asked for."""
    dtype, sizes, of_a_token = planned.dtype, planned.sizes, planned.of_a_token
    rate = Rate(asked.rate, asked.rate) if asked.rate else Rate.measured(dtype, pick_device("auto"))
    rate = replace(rate, read=asked.reading or rate.read)
    entries = [entry(phase, rate, phase.need.peak) for phase in phases]
    each = [1 if x["phase"] in NOT_SHARED else asked.devices for x in entries]
    if asked.devices > 1:
        for x, phase, n in zip(entries, phases, each, strict=True):
            sent = {k: phase.need.sent(asked.devices, k == "sharded") for k in ("whole", "sharded")}
            x |= {"device_flops": x["flops"] / n, "sent_bytes": sent}
    return {
        "model": job.model,
        "parameters": sizes.weights // dtype.itemsize,
        "dtype": dtype_name(dtype),
        "targets": list(planned.targets),
        **({"active_parameters": [x["active_after"] for x in of_a_token]} if of_a_token else {}),
        "weights_bytes": sizes.weights,
        "phases": entries,
        "peak_bytes": max(phase.need.peak for phase in phases),
        "main_memory_bytes": sizes.weights * planned.written.itemsize // dtype.itemsize,
        "disk_bytes": planned.disk(),
        "seconds": sum(x["seconds"] for x in entries),
        "seconds_on_devices": sum(x["seconds"] / n for x, n in zip(entries, each, strict=True)),
        "flops_per_second": rate.plain,
        "fine_flops_per_second": rate.fine,
        **({"bytes_per_second": rate.read} if rate.read else {}),
        "rate": "named" if asked.rate else "measured here",
    }


def _choices(planned: Plan, phases: Sequence[Phase], devices: int, memory: float) -> dict[str, Any]:
    """Return the settings that take less, and the first of them that fits."""
    found = []
    for variant in variants_of(planned, phases, (devices,)):
        # One process keeps layers off its device, several share them out.
        if devices == 1 or "--offload" not in variant.settings:
            phase, peak = max(variant.peaks.items(), key=lambda x: x[1])
            about = {"peak_bytes": round(peak), "phase": phase, "step_time": variant.factor}
            fits = {"fits": peak <= SPARE * memory, "how": variant.how}
            found.append({"settings": variant.settings, **about, **fits})
    first = next((x["settings"] for x in found if x["fits"]), None)
    return {"devices": devices, "device_memory_bytes": memory, "settings": found, "fits": first}


def config_of(model: str) -> PreTrainedConfig:
    """Return a model's config: of a checkpoint, of a folder with it alone, or the file itself.

    Raises:
        UserError: if there is none, or it lacks what a plan needs.
    """
    path = at_home(model)
    where = str(path) if path.is_file() else locate(model)
    if not path.is_file():
        read_config(model)  # refuses what is no causal language model
    config = load_config(where)
    values, _ = PreTrainedConfig.get_config_dict(where)
    if wrapper_of(str(values.get("model_type"))):
        return config  # such files leave out what their class has by default
    names = family_named(config.model_type).config_names
    needed = {"num_hidden_layers", "vocab_size"} | {
        names[x] for x in ("heads", "neurons", "hidden") if x in names
    }
    if missing := sorted(needed - set(values)):
        raise UserError(
            f"the config of {model} has no {', '.join(missing)}, which a plan needs: pass the "
            "config.json of the checkpoint itself"
        )
    return config


def variants_of(planned: Plan, phases: Sequence[Phase], counts: Sequence[int]) -> Iterator[Variant]:
    """Yield settings that take less, those that cost least first.

    Args:
        planned: the run as asked.
        phases: its phases.
        counts: numbers of devices that weights may be sharded over.
    """
    args = planned.args
    whole = {x.name: x.need.peak for x in phases if x.name != "save"}
    yield Variant("as asked", whole)
    size, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    less: dict[str, Any] = {}
    words, factor = "", 1.0
    if size > 1:
        accumulated *= size
        less |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulated}
        words = f"--batch-size 1 --set gradient_accumulation_steps={accumulated} "
        yield Variant(words.strip(), whole := _with(planned, whole, less))
    if not args.gradient_checkpointing:
        less |= {"gradient_checkpointing": True}
        words, factor = f"{words}--gradient-checkpointing ", SLOWER
        yield Variant(words.strip(), whole := _with(planned, whole, less), factor)
    on_device = {k: v for k, v in whole.items() if k != "slice"}  # that in main memory
    for count in (x for x in counts if x > 1):
        peaks = sharded(planned, on_device, count)
        yield Variant(f"{words}--set sharded=true", peaks, factor, FORMULA)
    # Stacked experts are not cut in fewer bits.
    for bits in () if planned.allocator.budget.per_token else (8, 4):
        yield Variant(f"{words}--bits {bits}", in_bits(planned, on_device, bits), factor, FORMULA)
    if not planned.allocator.budget.family.mixer:  # mixers stay on the device
        yield Variant(f"{words}--offload", offloaded(planned, on_device), factor, FORMULA)


def _with(planned: Plan, whole: Mapping[str, float], less: Mapping[str, Any]) -> dict[str, float]:
    """Return peaks under other settings of the steps."""
    # Not made anew, since that lets settings of before win under their other names.
    args = copy.copy(planned.args)
    vars(args).update(less)
    steps = replace(planned, args=args).teach()
    return {**whole, **{x.name: x.need.peak for x in steps}}


def _print(result: Mapping[str, Any], planned: Plan, output: Output) -> None:
    args, config = planned.args, planned.config
    output.line(
        f"Model   {result['model']}: {config.model_type}, {config.num_hidden_layers} layers, "
        f"{millions(result['parameters'])} parameters, {megabytes(result['weights_bytes'])} in "
        f"{result['dtype']}"
    )
    output.line(
        f"Run     {args.max_steps} steps of {args.per_device_train_batch_size} x "
        f"{args.gradient_accumulation_steps} x {planned.length} tokens to "
        f"{', '.join(f'{x:.1%}' for x in planned.targets)}; LoRA rank {args.lora_rank}"
    )
    if active := planned.of_a_token:
        after = ", ".join(millions(x["active_after"]) for x in active)
        output.line(f"Active  {millions(active[0]['active_before'])} per token, then {after}")
    print_phases(result["phases"], "peak on a device", output)
    if "settings" in result:
        memory = megabytes(result["device_memory_bytes"])
        rows = [
            [
                x["settings"],
                megabytes(x["peak_bytes"]),
                x["phase"],
                f"{x['step_time']:.2f}",
                "yes" if x["fits"] else "no",
                x["how"],
            ]
            for x in result["settings"]
        ]
        columns = ["settings", "peak", "of", "x step time", "fits", "how"]
        output.table(f"On {result['devices']} x {memory}, cheapest first", columns, rows)
        output.line(
            f"Fits    {result['fits'] or 'none of these; take more memory or a smaller model'}"
        )
        if result["devices"] > 1:
            _print_shares(result, output)
    written = sum(x for what, x in result["disk_bytes"].items() if what not in ON_CPUS)
    output.line(
        f"Disk    {megabytes(written)}; main memory: {megabytes(result['main_memory_bytes'])} of "
        "weights, mapped from files, read at the start and at the end"
    )
    output.line(
        f"Time    {duration(result['seconds'])} at {result['flops_per_second'] / 1e12:.2f} "
        f"TFLOP/s, {result['rate']}; products alone are counted"
        + (", and what writing reads" if "bytes_per_second" in result else "")
    )


def _print_shares(result: Mapping[str, Any], output: Output) -> None:
    """Print how long several devices take for the same batches, and what they do not share out."""
    rows = [
        [x["phase"], tera(x["device_flops"]), *map(megabytes, x["sent_bytes"].values())]
        for x in result["phases"]
    ]
    columns = ["phase", "TFLOP", "sends, weights whole", "sends, weights sharded"]
    output.table(f"What each of {result['devices']} devices does", columns, rows)
    output.line(
        f"Devices {duration(result['seconds_on_devices'])} with the weights whole on each of "
        f"{result['devices']}: all work is shared out but {' and '.join(NOT_SHARED)}"
    )
