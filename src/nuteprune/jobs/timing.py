"""Speed as it is measured everywhere: models in processes of their own, in turns, pair by pair.

Each engine that runs models prepares them for such a process.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from nuteprune.console import Bars, dtype_name
from nuteprune.errors import UserError
from nuteprune.export.record import weights_size
from nuteprune.files import write_json
from nuteprune.jobs.sources import load_model, load_tokenizer, locate, pick_device, pick_dtype
from nuteprune.judge.bench import Timing, advice, compare, say_ratio, summarize
from nuteprune.judge.llama_cpp import LlamaCppRunner, require_binding
from nuteprune.judge.work import Work, Workload
from nuteprune.judge.worker import Runner, TorchRunner, Worker
from nuteprune.model.family_file import from_dict, to_dict
from nuteprune.model.lookup import all_brought_along, bring_along

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
ENGINES = (TRANSFORMERS, LLAMA_CPP)
"""What runs models; the default first."""
GGUF_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
REPORTED = (
    ("prefill", "tokens/s", "prefill_tokens_per_second", 1, "higher", "prefill"),
    ("decode", "tokens/s", "decode_tokens_per_second", 1, "higher", "decode"),
    ("first token", "ms", "first_token_seconds", 1000, "lower", "prefill"),
)
"""Rows of the report: name, unit, key of the figure and its scale, which way is better, phase."""


@dataclass(frozen=True)
class Engine:
    """A program that runs models, and how it does.

    Args:
        name: one of `ENGINES`.
        device: `cpu` or `cuda`.
        dtype: the one to compute in; of llama.cpp that of matrices in the file.
        threads: on a CPU; None: as many as torch takes.
    """

    name: str
    device: str
    dtype: torch.dtype
    threads: int | None = None

    def prepare(self, model: str, place: Path, bars: Bars) -> Callable[[], Runner]:
        """Return what loads a model, in a worker's process; for llama.cpp it is exported.

        Args:
            model: as the user named it.
            place: a path that is free for its file, in a folder that lives as long as the workers.
            bars: where progress is shown.
        """
        if self.name == LLAMA_CPP:
            return self._exported(model, place, bars)
        own = tuple(map(to_dict, all_brought_along()))
        return partial(self._load, model, own)

    def bytes_on_disk(self, model: str, place: Path) -> int | None:
        """Return the bytes of the files of a loaded model, None where they cannot be told."""
        return place.stat().st_size if self.name == LLAMA_CPP else _on_disk(model)

    def _load(self, model: str, own: tuple[dict[str, Any], ...]) -> TorchRunner:
        """Load a model in the worker's process, after registering the users' families there."""
        for entry in own:
            bring_along(from_dict(entry, Path("--family")))
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        loaded = load_model(model, self.dtype)
        loaded.to(self.device)  # type: ignore[arg-type]
        return TorchRunner(loaded)

    def _exported(self, model: str, file: Path, bars: Bars) -> Callable[[], Runner]:
        from nuteprune.export.gguf.write import write_gguf  # what others do not need

        loaded = load_model(model, None)
        write_gguf(
            loaded,
            load_tokenizer(model, remedy="leave --engine out, since transformers needs none"),
            file,
            type_name=GGUF_TYPES[self.dtype],
            progress=lambda done, total: bars.update(f"exporting {model}", done, total),
        )
        work = dataclasses.replace(Work.of(loaded), bytes_per_parameter=self.dtype.itemsize)
        positions = getattr(loaded.config, "max_position_embeddings", None)
        return partial(LlamaCppRunner, str(file), work, positions, self.threads)


def pick_engine(name: str, device: str, dtype: str, threads: int | None = None) -> Engine:
    """Return the engine that options ask for; device and dtype may be `auto`.

    Raises:
        UserError: if the engine is unknown, or cannot run here with these options.
    """
    if name not in ENGINES:
        raise UserError(f"--engine {name} is unknown; pass one of {', '.join(ENGINES)}")
    if name == LLAMA_CPP:
        require_binding()
        if device not in ("auto", "cpu"):
            raise UserError(f"device {device}: llama.cpp is timed on the CPU; leave --device out")
        # The exporter's default, whatever the hardware: what people run.
        device, dtype = "cpu", "float16" if dtype == "auto" else dtype
    kind = pick_device(device)
    return Engine(name, kind, pick_dtype(dtype, kind), threads)


def _on_disk(model: str) -> int | None:
    """Return the bytes of a model's weight files, None where they cannot be told."""
    folder = Path(locate(model))
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
            return None
    return weights_size(folder) or None


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
        places = {name: folder / f"{i}.gguf" for i, name in enumerate(names)}
        loads = {name: engine.prepare(name, place, bars) for name, place in places.items()}
        workers = {name: stack.enter_context(Worker(name, load)) for name, load in loads.items()}
        _check_positions(workers, settings)
        measured = [_timed(workers, setting, repeats, bars) for setting in settings]
        models = {}
        for name, worker in workers.items():
            work = worker.about.work
            models[name] = {
                **dataclasses.asdict(work),
                "bytes_in_memory": work.parameters * work.bytes_per_parameter,
                "bytes_on_disk": engine.bytes_on_disk(name, places[name]),
            }
    first = workers[names[0]].about
    return {
        "model": names[0],
        "against": names[1] if len(names) == 2 else None,
        **{x: getattr(first, x) for x in ("engine", "hardware", "threads", "attention")},
        "models": models,
        "settings": measured,
        "advice": advice([x["speedup"] for x in measured if "speedup" in x], first.work),
        "device": engine.device,
        "dtype": dtype_name(engine.dtype),
        "repeats": repeats,
    }


def _check_positions(workers: dict[str, Worker], settings: Sequence[Workload]) -> None:
    longest = max(x.length + x.new_tokens for x in settings)
    for name, worker in workers.items():
        if worker.about.positions is not None and longest > worker.about.positions:
            raise UserError(
                f"{name} has {worker.about.positions} positions, and a prompt with its new tokens "
                f"takes {longest}; pass smaller --lengths or --new-tokens"
            )


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
