"""Speed as it is measured everywhere: models in processes of their own, in turns, pair by pair."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nuteprune.console import Bars
from nuteprune.errors import UserError
from nuteprune.jobs.engines import Engine, Ready
from nuteprune.judge.bench import Timing, advice, compare, say_ratio, summarize
from nuteprune.judge.work import Workload
from nuteprune.judge.worker import Worker

REPORTED = (
    ("prefill", "tokens/s", "prefill_tokens_per_second", 1, "higher", "prefill"),
    ("decode", "tokens/s", "decode_tokens_per_second", 1, "higher", "decode"),
    ("first token", "ms", "first_token_seconds", 1000, "lower", "prefill"),
)
"""Rows of the report: name, unit, key of the figure and its scale, which way is better, phase."""


def measure(
    names: Sequence[str],
    settings: Sequence[Workload],
    repeats: int,
    engine: Engine,
    bars: Bars,
) -> dict[str, Any]:
    """Time one model, or a model and the dense one.

    Args:
        names: the model, and the dense one if they are compared.
        settings: those to time.
        repeats: counted passes of each, after one to warm up.
        engine: what runs them.
        bars: where progress is shown.

    Returns:
        All figures, fit for JSON; see docs/json.md.

    Raises:
        UserError: if a model has too few positions.
    """
    gc.collect()  # a trainer and its callbacks point at each other; others need the memory now
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ready = {name: engine.prepare(name, folder / str(i), bars) for i, name in enumerate(names)}
        workers = {name: stack.enter_context(Worker(name, one.load)) for name, one in ready.items()}
        _check_positions(workers, settings)
        timings = [_time(workers, setting, repeats, bars) for setting in settings]
    found = _result(workers, ready, settings, timings)
    return {**found, "device": engine.device, "dtype": engine.dtype, "repeats": repeats}


def _check_positions(workers: dict[str, Worker], settings: Sequence[Workload]) -> None:
    longest = max(x.length + x.new_tokens for x in settings)
    for name, worker in workers.items():
        if worker.about.positions is not None and longest > worker.about.positions:
            raise UserError(
                f"{name} has {worker.about.positions} positions, and a prompt with its new tokens "
                f"takes {longest}; pass smaller --lengths or --new-tokens"
            )


def _time(
    workers: dict[str, Worker], setting: Workload, repeats: int, bars: Bars
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
    ready: dict[str, Ready],
    settings: Sequence[Workload],
    timings: Sequence[dict[str, list[Timing]]],
) -> dict[str, Any]:
    """Return all figures, fit for JSON."""
    first = next(iter(workers.values()))
    models = {
        name: {
            **dataclasses.asdict(worker.about.work),
            "bytes_in_memory": worker.about.work.parameters * worker.about.work.bytes_per_parameter,
            "bytes_on_disk": ready[name].bytes_on_disk(),
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
        "against": list(workers)[1] if len(workers) == 2 else None,
        "engine": first.about.engine,
        "hardware": first.about.hardware,
        "threads": first.about.threads,
        "attention": first.about.attention,
        "models": models,
        "settings": measured,
        "advice": advice(faster, first.about.work),
    }


def conditions(found: dict[str, Any]) -> str:
    """Return what a measurement was made on and how, in a line."""
    threads = f", {found['threads']} thread{'s' if found['threads'] != 1 else ''}"
    threads = threads if found["device"] == "cpu" else ""
    return (
        f"{found['engine']}, {found['hardware']}{threads}, {found['dtype']}, "
        f"{found['attention']} attention, KV cache; medians of {found['repeats']} passes"
    )


def for_report(found: dict[str, Any]) -> dict[str, Any]:
    """Return the medians as the report reads them: rows of dense next to pruned."""
    rows, notes = [], []
    for setting in found["settings"]:
        ours, dense = setting["models"].values()
        size = f"batch {setting['batch_size']}, {setting['length']} tokens"
        notes.append(f"{size}: {'; '.join(_against_bound(setting['speedup']))}")
        for name, unit, key, scale, better, phase in REPORTED:
            old, new = (scale * x[key]["median"] for x in (dense, ours))
            row = {"name": f"{name}, {size}", "unit": unit, "dense": old, "pruned": new}
            ratio = setting["speedup"][phase]
            kept = {k: ratio[k] for k in ("low", "high", "bound", "verdict")}
            rows.append({**row, "better": better, "gain": ratio["median"], **kept})
    return {"conditions": conditions(found), "rows": rows, "notes": [*notes, *found["advice"]]}


def _against_bound(speedup: dict[str, Any]) -> Iterator[str]:
    for phase, ratio in speedup.items():
        if phase != "both":
            share = "" if ratio["reached"] is None else f"{ratio['reached']:.0%} of "
            yield f"{phase} {say_ratio(ratio)}, {share}its bound {ratio['bound']:.2f} x"
