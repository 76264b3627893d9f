"""Settings from a YAML file and from `--set key=value`: checked keys and types."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

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
    "bits": int,
}
"""Settings of a job beside the trainer's: key -> type."""

SHORT = {
    "sparsity": "target_sparsity",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
}
"""The command line's words for some of the trainer's settings."""

_STEPS, _EVAL = "pass --steps", "score a checkpoint with nuteprune eval OUT/run/checkpoint-N"
_SHARDED, _HUB = "pass sharded=true instead, see docs/scale.md", "upload the result with hf upload"
_REFUSED = {
    "output_dir": "pass --out",
    "use_cpu": "pass --device cpu",
    "resume_from_checkpoint": "pass --resume",
    "num_train_epochs": _STEPS,
    "auto_find_batch_size": "try sizes with --dry-run",
    **dict.fromkeys(("hub_token", "push_to_hub"), _HUB),
    **dict.fromkeys(("do_eval", "do_predict", "eval_strategy", "eval_on_start"), _EVAL),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), _SHARDED),
    **dict.fromkeys(
        ("do_train", "load_best_model_at_end", "save_only_model", "local_rank"), "leave it out"
    ),
    "enable_jit_checkpoint": "a stopped run saves anyway",
}
"""Settings of transformers that have no place in a run here -> what to do instead."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, which YAML 1.1 wants with a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _hints() -> dict[str, Any]:
    """Return the type of each setting."""
    hints = get_type_hints(NutePruneConfig)
    names = {f.name for f in dataclasses.fields(NutePruneConfig) if f.init}
    return {**{k: hints[k] for k in sorted(names) if k not in _REFUSED}, **RUN_KEYS}


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
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {option} {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{option} {path} must be a mapping of keys to values")
    return {str(key): value for key, value in content.items()}


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # made of SafeLoader: it builds plain values only
    # ValueError: a date that is none, or a number of too many digits.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid YAML: {_short(error)}") from error


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by full name, with their types checked."""
    hints = _hints()
    checked = {}
    for given, value in settings.items():
        key = SHORT.get(given, given)
        if key in _REFUSED:
            raise UserError(f"setting {given} cannot be used here: {_REFUSED[key]}")
        if key not in hints:
            near = get_close_matches(given, [*hints, *SHORT], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown setting {_short(repr(given))}{hint}")
        checked[key] = _coerce(given, value, hints[key])
    return checked


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Return a value as one of the types that a setting may have, as it is where it can be."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain = tuple(get_origin(kind) or kind for kind in kinds)
    if type(value) in plain:
        return _finite(key, value)
    for kind in plain:
        with suppress(TypeError, ValueError, OverflowError):
            if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
                return _finite(key, float(value))
            if kind is int and isinstance(value, (float, str)) and float(value) == int(value):
                return int(value)
            if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
                return str(value)
    names = [kind.__name__ for kind in plain if kind in _PLAIN] or ["text"]
    raise UserError(
        f"setting {key} is {_short(reprlib.repr(value))}; it must be of type {' or '.join(names)}"
    )


_PLAIN = (bool, int, float, str, list, dict)


def _finite(key: str, value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"setting {key} is {value}; it must be a finite number")
    return value


def _short(text: object) -> str:
    return textwrap.shorten(str(text), 200, placeholder=" ...")
