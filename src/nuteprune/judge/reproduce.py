"""The command and the settings that make a run again, from its record."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from nuteprune.run_folder import TARGET

OPTIONS = {
    "target_sparsity": "--sparsity",
    "data": "--data",
    "eval_data": "--eval-data",
    "text_column": "--text-column",
    "max_steps": "--steps",
    "per_device_train_batch_size": "--batch-size",
    "length": "--length",
    "gates": "--gates",
    "shapes": "--shapes",
    "device": "--device",
    "dtype": "--dtype",
    "seed": "--seed",
}
"""Settings that `nuteprune prune` has an option of its own for; the others go through `--set`."""

TUNING = {
    "data": "--data",
    "text_column": "--text-column",
    "template": "--template",
    "steps": "--steps",
    "epochs": "--epochs",
    "batch_size": "--batch-size",
    "length": "--length",
    "learning_rate": "--learning-rate",
    "lora_rank": "--lora-rank",
    "dtype": "--dtype",
    "seed": "--seed",
}
"""What a record says of a recovery, and the options of `nuteprune recover` for it."""

BOOKKEEPING = frozenset({"save_steps", "save_total_limit", "dataloader_pin_memory"})
"""Settings that the command makes itself and that change no result."""


def settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was set in a run, its seed included, the model left out."""
    config = {**record.get("config", {}), "seed": record.get("seed")}
    return {
        key: value
        for key, value in config.items()
        if key != "model" and key not in BOOKKEEPING and value is not None
    }


def commands(record: Mapping[str, Any], out: str) -> list[list[str]]:
    """Return the commands that make a checkpoint again, each in parts that fit a line.

    Args:
        record: its nuteprune.json; empty if it tells no model.
        out: name of its folder.
    """
    tunings: list[Mapping[str, Any]] = []
    entry = record.get("recover")
    while entry:
        tunings.insert(0, entry)
        entry = entry.get("earlier")
    names = [*(f"{out}-{i}" for i in range(len(tunings))), out]
    first = command(record, names[0])
    if not first:
        return []
    if record["config"].get("stops"):  # then each target has a folder of its own
        names[0] += f"/{TARGET}{record['target']:g}"
    between = zip(tunings, names[:-1], names[1:], strict=True)
    return [first, *(_tuning(entry, *pair) for entry, *pair in between)]


def _tuning(entry: Mapping[str, Any], source: str, out: str) -> list[str]:
    """Return the command of a recovery, from its entry in the record."""
    spared = "steps" if entry.get("asked_for") == "epochs" else "epochs"
    given = {x: entry.get(key) for key, x in TUNING.items() if key != spared}
    parts = [
        f"{option} {shlex.quote(str(value))}"
        for option, value in given.items()
        if value not in (None, "auto")
    ]
    return [f"nuteprune recover {shlex.quote(source)}", *parts, f"--out {shlex.quote(out)}"]


def command(record: Mapping[str, Any], out: str) -> list[str]:
    """Return the command that makes the run again, in parts that each fit a line.

    Args:
        record: a run's nuteprune.json; empty if it tells no model.
        out: name of the output folder.
    """
    model = record.get("config", {}).get("model")
    if model is None:
        return []
    parts = [f"nuteprune prune {shlex.quote(model)}"]
    rest = []
    for key, value in settings(record).items():
        if key in OPTIONS:
            if value != "auto":
                parts.append(f"{OPTIONS[key]} {shlex.quote(str(value))}")
        else:
            rest.append(f"--set {shlex.quote(f'{key}={_inline(value)}')}")
    return [*parts, *rest, f"--out {shlex.quote(out)}"]


def recipe(record: Mapping[str, Any]) -> str:
    """Return the settings as a YAML file that `--config` reads."""
    return yaml.safe_dump(settings(record), sort_keys=False, allow_unicode=True)


def _inline(value: Any) -> str:
    """Return a value as `--set` reads it: YAML on one line."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return text.strip().removesuffix("...").strip()
