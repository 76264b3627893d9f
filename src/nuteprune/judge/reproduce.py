"""The command and the settings that make a run again, from its record."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

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
