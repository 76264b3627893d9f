"""Speed as it is measured everywhere: models in processes of their own, in turns, pair by pair."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from nuteprune.console import Bars, dtype_name
from nuteprune.export.hub import folder_of
from nuteprune.export.record import weights_size
from nuteprune.files import write_json
from nuteprune.jobs.sources import load_model, locate, pick_device, pick_dtype
from nuteprune.judge.bench import Timing, compare, say_ratio, summarize
from nuteprune.judge.work import Workload
from nuteprune.judge.worker import Worker
from nuteprune.model.family_file import from_dict, to_dict
from nuteprune.model.lookup import all_brought_along, bring_along

REPORTED = (
    ("prefill", "tokens/s", "prefill_tokens_per_second", 1, "higher", "prefill"),
    ("decode", "tokens/s", "decode_tokens_per_second", 1, "higher", "decode"),
    ("first token", "ms", "first_token_seconds", 1000, "lower", "prefill"),
)
"""Rows of the report: name, unit, key of the figure and its scale, which way is better, phase."""


@dataclass(frozen=True)
class Computing:
    """Where models compute, and in what.

    Args:
        device: `cpu` or `cuda`.
        dtype: the one to compute in.
        threads: on a CPU; None: as many as torch takes.
    """

    device: str
    dtype: torch.dtype
    threads: int | None = None

    @classmethod
    def asked(cls, device: str, dtype: str, threads: int | None = None) -> Computing:
        """Return what options ask for; device and dtype may be `auto`.

        Raises:
            UserError: if it cannot be had here.
        """
        kind = pick_device(device)
        return cls(kind, pick_dtype(dtype, kind), threads)

    def loader_of(self, model: str) -> Callable[[], PreTrainedModel]:
        """Return what loads a model in a worker's process, by the name that the user gave."""
        own = tuple(map(to_dict, all_brought_along()))
        return partial(self._load, model, own)

    def _load(self, model: str, own: tuple[dict[str, Any], ...]) -> PreTrainedModel:
        """Load a model in the worker's process, after registering the users' families there."""
        for entry in own:
            bring_along(from_dict(entry, Path("--family")))
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        loaded = load_model(model, self.dtype)
        loaded.to(self.device)  # type: ignore[arg-type]
        return loaded


def _on_disk(model: str) -> int | None:
    """Return the bytes of a model's weight files, None where they cannot be told."""
    folder = folder_of(locate(model))
    return None if folder is None else weights_size(folder) or None


def measure(
    names: Sequence[str],
    settings: Sequence[Workload],
    repeats: int,
    how: Computing,
    bars: Bars,
) -> dict[str, Any]:
    """Time one model, or a model and the dense one.

    Args:
        names: the model, and the dense one if they are compared.
        settings: those to time.
        repeats: counted passes of each, after one to warm up.
        how: where they compute, and in what.
        bars: where progress is shown.

    Returns:
        All figures, fit for JSON; see docs/json.md.
    """
    gc.collect()  # a trainer and its callbacks point at each other; others need the memory now
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with ExitStack() as stack:
        workers = {x: stack.enter_context(Worker(x, how.loader_of(x))) for x in names}
        measured = [_timed(workers, setting, repeats, bars) for setting in settings]
        models = {}
        for name, worker in workers.items():
            work = worker.about.work
            models[name] = {
                **dataclasses.asdict(work),
                "bytes_in_memory": work.parameters * work.bytes_per_parameter,
                "bytes_on_disk": _on_disk(name),
            }
    first = workers[names[0]].about
    return {
        "model": names[0],
        "against": names[1] if len(names) == 2 else None,
        "engine": f"transformers {transformers.__version__}",
        **{x: getattr(first, x) for x in ("hardware", "threads", "attention")},
        "models": models,
        "settings": measured,
        "device": how.device,
        "dtype": dtype_name(how.dtype),
        "repeats": repeats,
    }


def _timed(
    workers: dict[str, Worker], setting: Workload, repeats: int, bars: Bars
) -> dict[str, Any]:
    """Let the workers take turns, in an order that turns round each time; return the figures."""
    passes: dict[str, list[Timing]] = {name: [] for name in workers}
    what = f"batch {setting.batch_size}, prompt {setting.length}"
    for repeat in range(repeats + 1):
        for name in list(workers)[:: -1 if repeat % 2 else 1]:
            timing = workers[name].time(setting)
            if repeat:
                passes[name].append(timing)
        bars.update(what, repeat, repeats)
    models = {name: summarize(setting, timings) for name, timings in passes.items()}
    found: dict[str, Any] = {**dataclasses.asdict(setting), "models": models}
    if len(workers) == 2:
        (ours, dense), works = passes.values(), [x.about.work for x in workers.values()]
        found["speedup"] = compare(setting, ours, dense, *works)
    return found


def write_speed(path: Path, found: dict[str, Any]) -> None:
    """Keep what was measured of two models for the report."""
    write_json(path, {**found, **for_report(found)})


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
        beside = [f"{x} {_against_bound(setting['speedup'][x])}" for x in ("prefill", "decode")]
        notes.append(f"{size}: {'; '.join(beside)}")
        for name, unit, key, scale, better, phase in REPORTED:
            old, new = (scale * x[key]["median"] for x in (dense, ours))
            row = {"name": f"{name}, {size}", "unit": unit, "dense": old, "pruned": new}
            ratio = setting["speedup"][phase]
            kept = {k: ratio[k] for k in ("low", "high", "bound", "verdict")}
            rows.append({**row, "better": better, "gain": ratio["median"], **kept})
    return {"conditions": conditions(found), "rows": rows, "notes": notes}


def _against_bound(ratio: dict[str, Any]) -> str:
    share = "" if ratio["reached"] is None else f"{ratio['reached']:.0%} of "
    return f"{say_ratio(ratio)}, {share}its bound {ratio['bound']:.2f} x"
