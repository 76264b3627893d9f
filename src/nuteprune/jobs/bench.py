"""The job of `bench`: speed and memory of a checkpoint, next to the dense model."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import PreTrainedModel

from nuteprune.console import Bars, Output, megabytes, millions
from nuteprune.errors import UserError
from nuteprune.export.record import weights_size
from nuteprune.files import at_home
from nuteprune.jobs.sources import load_model, locate, pick_device, pick_dtype, read_config
from nuteprune.judge.bench import Setting, Timing, advice, compare, summarize
from nuteprune.judge.run_files import write_extra
from nuteprune.judge.verdicts import LABELS
from nuteprune.judge.worker import Worker
from nuteprune.run_folder import RECORD, RUN, SPEED

REPORTED = (
    ("prefill", "tokens/s", "prefill_tokens_per_second", 1, "higher", "prefill"),
    ("decode", "tokens/s", "decode_tokens_per_second", 1, "higher", "decode"),
    ("first token", "ms", "first_token_seconds", 1000, "lower", "prefill"),
)
"""Rows of the report: name, unit, key of the figure and its scale, which way is better, phase."""


def run(
    model: str,
    against: str | None,
    output: Output,
    *,
    batch_sizes: str,
    lengths: str,
    new_tokens: int,
    repeats: int,
    threads: int | None,
    device: str,
    dtype: str,
    save: bool,
) -> dict[str, Any]:
    """Time the models in turns, print what was found, and return it.

    Args:
        model: the checkpoint.
        against: the dense model; None: no comparison.
        output: where it is printed.
        batch_sizes: sequences at a time, comma separated.
        lengths: tokens of the prompt, comma separated.
        new_tokens: tokens decoded after the prompt.
        repeats: counted passes, after one to warm up.
        threads: on a CPU; None: as many as torch takes.
        device: `auto`, `cpu`, `cuda`.
        dtype: what is computed in.
        save: also write it into the run's folder, for the report.

    Raises:
        UserError: for anything that cannot work.
    """
    settings = [
        Setting(batch, length, _positive(new_tokens, "--new-tokens"))
        for batch in _numbers(batch_sizes, "--batch-sizes")
        for length in _numbers(lengths, "--lengths")
    ]
    _positive(repeats, "--repeats")
    if threads is not None:
        _positive(threads, "--threads")
    names = [model] if against in (None, model) else [model, str(against)]
    target = _target(names) if save else None
    kind = pick_device(device)
    computed = pick_dtype(dtype, kind)
    for name in names:
        read_config(name)
    with output.bars() as bars, ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, partial(_load, name, computed, kind), threads))
            for name in names
        }
        _check_positions(workers, settings)
        timings = [_time(workers, setting, repeats, bars) for setting in settings]
    found = _result(workers, settings, timings, against)
    found |= {"device": kind, "dtype": str(computed).removeprefix("torch."), "repeats": repeats}
    _print(found, output)
    if target is not None:
        write_extra(target, SPEED, {**found, **_for_report(found)})
        output.line(f"Written to {target / SPEED}")
    return found


def _positive(number: int, option: str) -> int:
    if number < 1:
        raise UserError(f"{option} {number}: pass at least 1")
    return number


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(x) for x in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: pass whole numbers with commas, such as 1,8") from None
    return list(dict.fromkeys(_positive(x, option) for x in numbers))


def _target(names: list[str]) -> Path:
    folder = at_home(names[0])
    if len(names) == 1:
        raise UserError("--save is for comparisons; pass the dense model as --against")
    if not (folder / RUN).is_dir() and not (folder / RECORD).is_file():
        raise UserError(
            f"--save writes {RUN}/{SPEED} for the report, and {folder} is not the output folder of "
            "a run; pass one as MODEL, or leave --save out"
        )
    return folder / RUN


def _load(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    model = load_model(name, dtype)
    model.to(device)  # type: ignore[arg-type]
    return model


def _check_positions(workers: dict[str, Worker], settings: list[Setting]) -> None:
    for name, worker in workers.items():
        longest = max(x.length + x.new_tokens for x in settings)
        if worker.about.positions is not None and longest > worker.about.positions:
            raise UserError(
                f"{name} has {worker.about.positions} positions, and a prompt with its new tokens "
                f"takes {longest}; pass smaller --lengths or --new-tokens"
            )


def _time(
    workers: dict[str, Worker], setting: Setting, repeats: int, bars: Bars
) -> dict[str, list[Timing]]:
    """Let the workers take turns, in an order that turns round each time."""
    timings: dict[str, list[Timing]] = {name: [] for name in workers}
    what = f"batch {setting.batch_size}, prompt {setting.length}"
    for repeat in range(repeats + 1):
        for name in list(workers)[:: -1 if repeat % 2 else 1]:
            timing = workers[name].time(setting)
            if repeat:
                timings[name].append(timing)
        bars.update(what, repeat, repeats)
    return timings


def _result(
    workers: dict[str, Worker],
    settings: list[Setting],
    timings: list[dict[str, list[Timing]]],
    against: str | None,
) -> dict[str, Any]:
    """Return all figures, fit for JSON."""
    first = next(iter(workers.values()))
    models = {
        name: {
            **dataclasses.asdict(worker.about.work),
            "bytes_in_memory": worker.about.work.parameters * worker.about.work.bytes_per_parameter,
            "bytes_on_disk": _on_disk(name),
        }
        for name, worker in workers.items()
    }
    measured = []
    for setting, found in zip(settings, timings, strict=True):
        entry: dict[str, Any] = {
            **dataclasses.asdict(setting),
            "models": {name: summarize(setting, passes) for name, passes in found.items()},
        }
        if len(workers) == 2:
            (ours, dense), works = found.values(), [x.about.work for x in workers.values()]
            entry["speedup"] = compare(setting, ours, dense, *works)
        measured.append(entry)
    faster = [entry["speedup"] for entry in measured if "speedup" in entry]
    return {
        "model": first.name,
        "against": against,
        "hardware": first.about.hardware,
        "threads": first.about.threads,
        "attention": first.about.attention,
        "models": models,
        "settings": measured,
        "advice": advice(faster, first.about.work),
    }


def _on_disk(name: str) -> int | None:
    """Return the bytes of a model's weight files, None where they cannot be told."""
    folder = Path(locate(name))
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
            return None
    return weights_size(folder) or None


def _print(found: dict[str, Any], output: Output) -> None:
    on_cpu = found["device"] == "cpu"
    output.line(f"{_conditions(found)} ± half their range")
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
            "bound: how many times fewer parameters are multiplied per prompt (prefill) or read "
            "per token (decode)"
        )
    for line in found["advice"]:
        output.line(line)


def _print_setting(setting: dict[str, Any], where: str, output: Output) -> None:
    models = list(setting["models"].values())

    def row(label: str, key: str, form: str, scale: float = 1) -> list[str]:
        return [label, *(_spread(x[key], form, scale) for x in models)]

    rows = [
        row("prefill tok/s", "prefill_tokens_per_second", "{:.0f}"),
        row("decode tok/s", "decode_tokens_per_second", "{:.1f}"),
        row("first token ms", "first_token_seconds", "{:.0f}", 1000),
        [f"peak {where} memory", *(megabytes(x["peak_memory_bytes"]) for x in models)],
    ]
    columns = ["", *LABELS[: len(models)]]
    if "speedup" in setting:
        columns += ["times faster", "bound", "reached"]
        for cells, phase in zip(rows, ("prefill", "decode"), strict=False):
            ratio = setting["speedup"][phase]
            share = f"{ratio['reached']:.0%}"
            cells += [_spread(ratio, "{:.2f}"), f"{ratio['bound']:.2f}", share]
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


def _conditions(found: dict[str, Any]) -> str:
    threads = ""
    if found["device"] == "cpu":
        threads = f", {found['threads']} thread{'s' if found['threads'] != 1 else ''}"
    return (
        f"{found['hardware']}{threads}, {found['dtype']}, {found['attention']} attention, KV "
        f"cache; medians of {found['repeats']} passes"
    )


def _for_report(found: dict[str, Any]) -> dict[str, Any]:
    """Return the medians as the report reads them: rows of dense next to pruned."""
    rows = []
    for setting in found["settings"]:
        ours, dense = setting["models"].values()
        size = f"batch {setting['batch_size']}, {setting['length']} tokens"
        for name, unit, key, scale, better, phase in REPORTED:
            old, new = (scale * x[key]["median"] for x in (dense, ours))
            row = {"name": f"{name}, {size}", "unit": unit, "dense": old, "pruned": new}
            ratio = setting["speedup"][phase]
            told = {"gain": ratio["median"], **{k: ratio[k] for k in ("low", "high", "bound")}}
            rows.append({**row, "better": better, **told})
    shares = [_against_bound(setting) for setting in found["settings"]]
    return {"conditions": _conditions(found), "rows": rows, "notes": [*shares, *found["advice"]]}


def _against_bound(setting: dict[str, Any]) -> str:
    said = (
        f"{phase} ×\u202f{ratio['median']:.2f} of the ×\u202f{ratio['bound']:.2f} that the "
        f"parameters moved allow ({ratio['reached']:.0%})"
        for phase, ratio in setting["speedup"].items()
    )
    return f"batch {setting['batch_size']}, {setting['length']} tokens: {', '.join(said)}"
