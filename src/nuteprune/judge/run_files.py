"""Reads what a run left in its folder, for the report.

An output folder of `prune` has nuteprune.json and, in run/, metrics.jsonl, trainer checkpoints and,
if something wrote them, two small files that the report shows as they are:

    samples.json  [{"prompt": text, "dense": text, "pruned": text}, ...]: answers; `which` says
                  why one is shown, and may be left out
    speed.json    {"conditions": text, "rows": [{"name": text, "unit": text, "dense": number,
                  "pruned": number, "better": "higher" or "lower", "gain": number, "low": number,
                  "high": number, "bound": number, "verdict": text}, ...], "notes": [text, ...]}:
                  medians of a benchmark. The gain says how many times better; low and high are
                  its spread; the bound is what the work saved allows; the verdict is that of bench.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuteprune.errors import UserError
from nuteprune.export.record import NUMBER, TEXT, Form, read_record, several, unlike
from nuteprune.run_folder import METRICS, RECORD, RUN, SAMPLES, SPEED, TARGETS

_SAMPLES = several("prompts with both answers", dict.fromkeys(("prompt", "dense", "pruned"), TEXT))
_TIMED = {
    **dict.fromkeys(("name", "unit", "better", "verdict"), TEXT),
    **dict.fromkeys(("dense", "pruned", "gain", "low", "high", "bound"), NUMBER),
}
_SPEED = {
    "conditions": TEXT,
    "rows": several("timed rows", _TIMED),
    "notes": several("texts", TEXT),
}


@dataclass(frozen=True)
class RunFiles:
    """A run, read from its files.

    Args:
        folder: the output folder.
        run: its folder of metrics and checkpoints, where the report goes.
        record: nuteprune.json, None while the run is unfinished.
        metrics: one mapping per logged step, in order.
        samples: rows of samples.json.
        speed: content of speed.json, None if there is none.
    """

    folder: Path
    run: Path
    record: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    speed: dict[str, Any] | None


def read_run(folder: Path) -> RunFiles:
    """Read a run, finished or not.

    Args:
        folder: the output folder of `prune` or `recover`, the folder of metrics in it, or the
            checkpoint of one of several targets. In a folder with several targets, the highest is
            read.

    Raises:
        UserError: if there is no run, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass the --out folder of prune or recover")
    folder = folder.resolve()
    named_so = folder.name == RUN and not (folder / RUN).is_dir()  # an output folder may be as well
    run = folder if (folder / METRICS).is_file() or named_so else folder / RUN
    root = folder.parent if run == folder and folder.name == RUN else folder
    if not (root / RECORD).is_file() and (highest := _highest_target(root)) is not None:
        root, run = highest, highest / RUN
    record = read_record(root) if (root / RECORD).is_file() else None
    metrics = _metrics(run / METRICS)
    if record is None and not metrics:
        raise UserError(
            f"{root} has neither {RECORD} nor a step in {RUN}/{METRICS}; pass the --out folder "
            "of prune or recover"
        )
    speed = _read(run / SPEED, _SPEED)
    return RunFiles(root, run, record, metrics, read_samples(run), speed)


def read_samples(run: Path) -> list[dict[str, Any]]:
    """Return the rows of SAMPLES in a run's folder, none if it has no such file.

    Raises:
        UserError: if they cannot be shown.
    """
    return _read(run / SAMPLES, _SAMPLES) or []


def pruning_steps(files: RunFiles) -> bool:
    """Return whether a run's steps are those of a pruning, not of a recovery."""
    return bool(files.metrics) and "sparsity" in files.metrics[-1]


def _highest_target(root: Path) -> Path | None:
    """Return the checkpoint of the highest target in a folder of several; None: of none."""
    found = [x.parent for name in TARGETS for x in root.glob(f"{name}*/{RECORD}")]
    return max(found, key=lambda folder: read_record(folder)["target"], default=None)


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Read the logged steps; a last line that was cut off in writing is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    steps = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            step = json.loads(line)
        except ValueError:
            step = None
        if _is_step(step):
            steps.append(step)
        elif number < len(lines):
            raise UserError(f"{path} is damaged in line {number}: no step can be read")
    return steps


def _is_step(line: Any) -> bool:
    """Return whether a line holds a step: its number and figures, None where there is none."""
    return (
        isinstance(line, dict)
        and isinstance(line.get("step"), int)
        and all(x is None or isinstance(x, int | float) for x in line.values())
    )


def _read(path: Path, form: Form) -> Any:
    """Return what a JSON file holds, None if there is none."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if wrong := next(unlike(found, form), None):
        raise UserError(f"{path} cannot be shown: {wrong}")
    return found
