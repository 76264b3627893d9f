"""Settings from a YAML file and from `--set key=value`: checked keys and types."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from nuteprune.errors import UserError
from nuteprune.train.config import NutePruneConfig

RUN_KEYS = {
    "data": str,
    "eval_data": str,
    "text_column": str,
    "length": int,
    "eval_blocks": int,
    "device": str,
    "dtype": str,
}
"""Settings of a job beside the trainer's: key -> type."""

SHORT = {
    "sparsity": "target_sparsity",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
}
"""The command line's words for some of the trainer's settings."""

_HIDDEN = {"output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "use_cpu"}


def _defaults() -> dict[str, Any]:
    fields = (f for f in dataclasses.fields(NutePruneConfig) if f.init and f.name not in _HIDDEN)
    return {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields}


def read_settings(config: Path | None, assignments: Iterable[str]) -> dict[str, Any]:
    """Return settings by their full names: those of the file, overridden by the assignments.

    Args:
        config: YAML file, a mapping of keys to values; None for none.
        assignments: `key=value`, the value in YAML.

    Raises:
        UserError: for an unreadable file, an unknown key (names the nearest), or a value of the
            wrong type.
    """
    settings = {} if config is None else read_mapping(config, "--config")
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: write it as key=value")
        settings[key.strip()] = _parse(value, f"--set {key}")
    return check(settings)


def read_mapping(path: Path, option: str) -> dict[str, Any]:
    """Return the mapping that a YAML or JSON file holds.

    Raises:
        UserError: if it cannot be read, or holds something else.
    """
    try:
        content = _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {option} {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{option} {path} must be a mapping of keys to values")
    return {str(key): value for key, value in content.items()}


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is no valid YAML: {error}") from error


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by full name, with their types checked."""
    defaults = _defaults()
    checked = {}
    for given, value in settings.items():
        key = SHORT.get(given, given)
        if key not in defaults and key not in RUN_KEYS:
            near = get_close_matches(given, [*defaults, *RUN_KEYS, *SHORT], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown setting {given!r}{hint}")
        expected = RUN_KEYS.get(key) or type(defaults[key])
        checked[key] = _coerce(given, value, expected)
    return checked


def _coerce(key: str, value: Any, expected: type) -> Any:
    if expected is type(None) or value is None or not isinstance(expected, type):
        return value
    try:
        if expected is float and not isinstance(value, bool):
            return float(value)
        if expected is int and not isinstance(value, bool) and float(value) == int(value):
            return int(value)
        if expected is bool and isinstance(value, bool):
            return value
        if expected is str and isinstance(value, (str, int, float)):
            return str(value)
        if expected not in (float, int, bool, str):
            return value
    except (TypeError, ValueError):
        pass
    raise UserError(f"setting {key} is {value!r}; it must be of type {expected.__name__}")
