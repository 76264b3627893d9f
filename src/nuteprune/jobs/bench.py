"""The job of `bench`: speed and memory of a checkpoint, next to the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nuteprune.console import Output, megabytes, millions
from nuteprune.data.tokens import check_positions
from nuteprune.errors import UserError
from nuteprune.export.loading import load_config
from nuteprune.files import at_home
from nuteprune.gates.costs import PHASES
from nuteprune.jobs.guard import check_absent, check_file, check_writable
from nuteprune.jobs.options import Benchmark
from nuteprune.jobs.sources import load_model, locate, read_config, use_family
from nuteprune.jobs.speed import write_table
from nuteprune.jobs.timing import Computing, conditions, measure, write_speed
from nuteprune.jobs.verdicts import LABELS
from nuteprune.judge.bench import say_ratio
from nuteprune.judge.work import Workload
from nuteprune.run_folder import RECORD, RUN, SPEED


def run(asked: Benchmark, output: Output) -> dict[str, Any]:
    """Time the models in turns, print what was found, and return it.

    Raises:
        UserError: for anything that cannot work.
    """
    model, against = asked.model, asked.against
    use_family(asked.family, against or model)
    settings = [
        Workload(batch, length, asked.new_tokens)
        for batch in _numbers(asked.batch_sizes, "--batch-sizes")
        for length in _numbers(asked.lengths, "--lengths")
    ]
    names = [model] if against in (None, model) else [model, str(against)]
    target = _target(names, asked.overwrite) if asked.save else None
    how = Computing.asked(asked.device, asked.dtype, asked.threads)
    for name in names:
        read_config(name)
    if asked.save_costs is not None:
        if against is not None or asked.save:
            raise UserError(
                "--save-costs writes a table of MODEL alone; leave out --against and --save, or "
                "time them without --save-costs"
            )
        path = at_home(asked.save_costs)
        reads = [("model", model), ("entry", asked.family)]
        check_file("--save-costs", path, reads, asked.overwrite, "costs.json")
        _check_positions([model], settings[:1])
        return _costs(model, path, settings[0], how, output)
    _check_positions(names, settings)
    with output.bars() as bars:
        found = measure(names, settings, asked.repeats, how, bars)
    found["against"] = against  # a model may be its own dense one
    _print(found, output)
    if target is not None:
        write_speed(target / SPEED, found)
        output.line(f"Written to {target / SPEED}")
    return found


def _check_positions(names: Sequence[str], settings: Sequence[Workload]) -> None:
    longest = max(x.length + x.new_tokens for x in settings)
    for name in names:
        what = f"a prompt of {name} with its new tokens"
        check_positions(longest, load_config(locate(name)), what)


def _costs(
    model: str, path: Path, setting: Workload, how: Computing, output: Output
) -> dict[str, Any]:
    """Write the table that `prune --costs` takes, and return it with its path as `out`."""
    if how.threads is not None:
        torch.set_num_threads(how.threads)
    loaded = load_model(model, how.dtype)
    table = write_table(path, loaded, setting, how)
    parts = [(f"{x['heads']} heads on {x['kv_heads']} KV heads", x) for x in table["attention"]]
    parts += [(f"{x['neurons']} neurons", x) for x in table["mlp"]]
    parts.append(("all else", table["rest"]))
    rows = [[name, *(f"{1000 * x[phase]:.3f}" for phase in PHASES)] for name, x in parts]
    output.table("Milliseconds of a block", ["", "prompt", "token"], rows)
    output.line(f"Written to {path}")
    return {"out": str(path), **table}


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = dict.fromkeys(int(x) for x in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text}: pass whole numbers with commas, such as 1,8") from None
    if min(numbers) < 1:
        raise UserError(f"{option} {text}: pass at least 1")
    return list(numbers)


def _target(names: list[str], overwrite: bool) -> Path:
    folder = at_home(names[0])
    if len(names) == 1:
        raise UserError("--save is for comparisons; pass the dense model as --against")
    if not (folder / RUN).is_dir() and not (folder / RECORD).is_file():
        raise UserError(
            f"--save writes {RUN}/{SPEED} for the report, and {folder} is not the output folder of "
            "a run; pass one as MODEL, or leave --save out"
        )
    check_absent([folder / RUN / SPEED], overwrite, "leave --save out")
    check_writable("--save", folder / RUN / SPEED)
    return folder / RUN


def _print(found: dict[str, Any], output: Output) -> None:
    on_cpu = found["device"] == "cpu"
    output.line(f"{conditions(found)} ± half their range")
    for label, (name, about) in zip(LABELS, found["models"].items(), strict=False):
        disk = "-" if about["bytes_on_disk"] is None else megabytes(about["bytes_on_disk"])
        output.line(
            f"{label}: {name}, {millions(about['parameters'])} parameters, {disk} on disk, "
            f"{megabytes(about['bytes_in_memory'])} of weights in memory"
        )
    output.line()
    for setting in found["settings"]:
        _print_setting(setting, "process" if on_cpu else "GPU", output)
    if any("speedup" in setting for setting in found["settings"]):
        output.line(
            "bound: how many times fewer numbers are multiplied per prompt (prefill) or read per "
            "token (decode), or calls made. Above it a ratio is noise; one whose range covers 1 "
            "tells no difference"
        )


def _print_setting(setting: dict[str, Any], where: str, output: Output) -> None:
    models = list(setting["models"].values())
    rows = [
        ["prefill tok/s", *(_spread(x["prefill_tokens_per_second"], "{:.0f}") for x in models)],
        ["decode tok/s", *(_spread(x["decode_tokens_per_second"], "{:.1f}") for x in models)],
        ["first token ms", *(_spread(x["first_token_seconds"], "{:.0f}", 1000) for x in models)],
        [f"peak {where} memory", *(megabytes(x["peak_memory_bytes"]) for x in models)],
    ]
    columns = ["", *LABELS[: len(models)]]
    if "speedup" in setting:
        columns += ["times faster", "bound", "reached", "verdict"]
        for cells, phase in zip(rows, ("prefill", "decode"), strict=False):
            ratio = setting["speedup"][phase]
            share = "-" if ratio["reached"] is None else f"{ratio['reached']:.0%}"
            cells += [_spread(ratio, "{:.2f}"), f"{ratio['bound']:.2f}", share, say_ratio(ratio)]
    padded = [[*cells, *[""] * (len(columns) - len(cells))] for cells in rows]
    title = (
        f"Batch {setting['batch_size']}, prompt of {setting['length']} tokens, "
        f"{setting['new_tokens']} new ones"
    )
    output.table(title, columns, padded)


def _spread(spread: dict[str, float], form: str, scale: float = 1) -> str:
    """Return a median with half the range that it comes from, in percent of it."""
    half = (spread["high"] - spread["low"]) / 2 / spread["median"]
    return f"{form.format(scale * spread['median'])} ±{half:.0%}"
