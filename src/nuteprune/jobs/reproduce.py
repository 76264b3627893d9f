"""The command and the settings that make a run again, from its record."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from nuteprune.jobs.job import PruneJob, RecoverJob
from nuteprune.train.asked import KINDS, Asked
from nuteprune.train.declared import CALL, declared
from nuteprune.train.settings import PruneSettings

OPTIONS = {
    name: x.option
    for kind in (PruneSettings, PruneJob)
    for name, x in declared(kind).items()
    if x.option and not x.flag and name != "shape"
} | {"keep": "--keep"}
"""Settings that have an option of their own, of `vocab` too; the others go through `--set`."""
TUNING = {
    x.word: x.option
    for x in declared(RecoverJob).values()
    if x.option and not x.flag and x.role != CALL
}
"""What a record says of a recovery, and the options of `nuteprune recover` for it."""
NOT_OF_RECORD = ("accumulation", "save_steps", "device")
"""Options of `recover` that its entry in a record does not speak of, or not in its words."""

BOOKKEEPING = frozenset({"save_steps", "save_total_limit", "dataloader_pin_memory"})
"""Settings that the command makes itself and that change no result."""


def settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run, with its seed and without the model."""
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
    targets = ("target_sparsity", *(f"target_{kind}" for kind in KINDS))
    if any(isinstance(settings(record).get(x), list) for x in targets):  # each has its own folder
        asked = record.get("asked", {"kind": "sparsity", "value": record["target"]})
        names[0] += f"/{Asked(asked['kind'], asked['value']).folder}"
    between = zip(tunings, names[:-1], names[1:], strict=True)
    return [first, *(_tuning(entry, *pair) for entry, *pair in between)]


def _tuning(entry: Mapping[str, Any], source: str, out: str) -> list[str]:
    """Return the command of a recovery, from its entry in the record."""
    spared = "steps" if entry.get("asked_for") == "epochs" else "epochs"
    given = {x: entry.get(key) for key, x in TUNING.items() if key not in (spared, *NOT_OF_RECORD)}
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
    given, model = settings(record), record.get("config", {}).get("model")
    if model is None:
        return []
    cuts_vocabulary = "keep" in given
    if cuts_vocabulary:  # which draws nothing
        given.pop("seed", None)
    parts, rest = [f"nuteprune {'vocab' if cuts_vocabulary else 'prune'} {shlex.quote(model)}"], []
    for key, value in given.items():
        if key == "data":
            named = [value] if isinstance(value, str) else value
            parts.extend(f"{OPTIONS[key]} {shlex.quote(spec)}" for spec in named)
        elif key in OPTIONS:
            if value != "auto":
                parts.append(f"{OPTIONS[key]} {shlex.quote(_plain(value))}")
        else:
            rest.append(f"--set {shlex.quote(f'{key}={_inline(value)}')}")
    return [*parts, *rest, f"--out {shlex.quote(out)}"]


def recipe(record: Mapping[str, Any]) -> str:
    """Return the settings as a YAML file that `--config` reads."""
    return yaml.safe_dump(settings(record), sort_keys=False, allow_unicode=True)


def again(record: Mapping[str, Any], out: str) -> tuple[list[list[str]], str]:
    """Return the commands and the settings that make a checkpoint again, for its report."""
    by_options_alone = "keep" in record.get("config", {})  # `vocab` reads no file
    return commands(record, out), recipe(record) if record and not by_options_alone else ""


def _plain(value: Any) -> str:
    """Return a value as an option takes it: several with commas."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _inline(value: Any) -> str:
    """Return a value as `--set` reads it: YAML on one line."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return text.strip().removesuffix("...").strip()
