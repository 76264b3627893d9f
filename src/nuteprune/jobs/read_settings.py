"""Settings as users give them, in YAML, `--set key=value` or keywords: checked, and made a job."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import reprlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from numbers import Number
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from nuteprune.data.specs import refuse_self
from nuteprune.errors import RunFailed, UserError, did_you_mean
from nuteprune.files import at_home
from nuteprune.jobs.job import Job, PruneJob
from nuteprune.train.asked import SETTINGS, check_one
from nuteprune.train.declared import CALL, declared
from nuteprune.train.settings import PruneSettings

J = TypeVar("J", bound=Job)

_STEPS, _EVAL = "pass --steps", "judge the result with nuteprune eval OUT"
_SHARDED = "pass sharded=true instead, see docs/large-models.md"
_HUB = "upload the result with hf upload"
_REFUSED = {
    "output_dir": "pass --out",
    "use_cpu": "pass --device cpu",
    "resume_from_checkpoint": "pass --resume",
    "num_train_epochs": _STEPS,
    "auto_find_batch_size": "try sizes with --dry-run",
    **dict.fromkeys(("hub_token", "push_to_hub"), _HUB),
    **dict.fromkeys(("do_eval", "do_predict", "eval_strategy", "eval_on_start"), _EVAL),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), _SHARDED),
    **dict.fromkeys(("do_train", "load_best_model_at_end", "local_rank"), "leave it out"),
    "enable_jit_checkpoint": "a stopped run saves anyway",
}
"""Settings of transformers that have no place in a run here -> what to do instead."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, which YAML 1.1 wants with a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)

FILES = ("shape", "family", "costs", "own_text")
"""Settings that may name a file."""


def make_job(
    kind: type[J],
    given: Mapping[str, Any],
    config: str | os.PathLike[str] | None = None,
    assignments: Iterable[str] = (),
) -> J:
    """Return a job from a settings file, `--set`, and options or keywords, the later winning.

    Args:
        kind: the dataclass of the job.
        given: options or keywords by the word that users have for them, or by full name; None
            where not given.
        config: YAML file with settings.
        assignments: `key=value`, the value in YAML.

    Raises:
        UserError: for an unknown setting, a value of the wrong type, or two that contradict.
    """
    if given["out"] == "":
        raise UserError("--out is empty: is a variable not set? Name a folder")
    file = None if config is None else at_home(Path(config))
    told = {} if file is None else read_mapping(file, "--config")
    assigned = read_assignments(assignments)
    now = {key: value for key, value in given.items() if value is not None}
    trainer: type | None = PruneSettings if issubclass(kind, PruneJob) else None
    if trainer is not None and {**told, **assigned, **now}.get("progressive") is True:
        # Masks that move have settings of their own.
        trainer = import_module("nuteprune.progressive.settings").ProgressiveSettings
    kinds = [kind, *([trainer] if trainer else [])]
    settings = winning(check(now, kinds), read_given(told, assigned, kinds))
    check_one(settings, SETTINGS)
    if settings.get("data") == []:
        raise UserError("data names no text: name some, or leave it out")
    refuse_self(settings.get("eval_data") or "")
    named = (file, *map(settings.get, FILES))
    files = tuple(at_home(x) for x in named if isinstance(x, (str, Path)))
    if isinstance(settings.get("shape"), str):
        settings["shape"] = read_mapping(at_home(settings["shape"]), "--shape")
    fields = {x.name for x in dataclasses.fields(kind)}
    own = {key: settings.pop(key) for key in list(settings) if key in fields}
    own["files"] = files
    own["out"] = at_home(own["out"])  # of `--out=~/x` the shell leaves it
    if trainer is not None:
        own["settings"] = settings
        ours = declared(trainer).keys() & settings.keys()
        trainer(**{key: settings[key] for key in ours})  # checks them
    return kind(**own)


def check_target(job: PruneJob) -> None:
    """Refuse a job without a target.

    Raises:
        UserError: naming the options that say it.
    """
    if not SETTINGS.keys() & job.settings.keys():
        raise UserError(
            "no target given: pass --sparsity, such as --sparsity 0.2, or one of "
            f"{', '.join(option for option in SETTINGS.values() if option != '--sparsity')}"
        )


def _known(kinds: Sequence[type], call: bool) -> dict[str, tuple[str, Any]]:
    """Return the settings that dataclasses declare: word and full name -> (full name, type).

    Args:
        kinds: the dataclasses.
        call: whether what only one call does counts too.
    """
    found: dict[str, tuple[str, Any]] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for name, x in declared(kind).items():
            if call or x.role != CALL or issubclass(kind, PruneSettings):
                found[name] = found[x.word] = (name, hints[name])
    return found


def read_given(
    told: Mapping[str, Any], assigned: Mapping[str, Any], kinds: Sequence[type]
) -> dict[str, Any]:
    """Return settings by their full names: those of a file, overridden by assignments.

    Args:
        told: what the file says.
        assigned: see `read_assignments`.
        kinds: the dataclasses that declare them.

    Raises:
        UserError: for an unknown key (names the nearest), or a value of the wrong type.
    """
    rest = {key: x for key, x in told.items() if key not in assigned}
    return winning(check(assigned, kinds, call=False), check(rest, kinds, call=False))


def read_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Return the values of `key=value`, each in YAML.

    Raises:
        UserError: for one that is written otherwise.
    """
    assigned = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: write it as key=value")
        assigned[key.strip()] = _parse(value, f"--set {key}")
    return assigned


def winning(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings and those that they win over; how much is to go is said in one way alone."""
    if SETTINGS.keys() & now.keys():
        before = {key: x for key, x in before.items() if key not in SETTINGS}
    return {**before, **now}


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


def check(settings: Mapping[str, Any], kinds: Sequence[type], call: bool = True) -> dict[str, Any]:
    """Return settings by full name, with their types checked.

    Args:
        settings: word or full name -> value.
        kinds: the dataclasses that declare them.
        call: whether settings of a single call, such as `resume`, may be among them.

    Raises:
        UserError: for an unknown setting, one that is given by two names, or a value of the wrong
            type.
    """
    known = _known(kinds, call)
    checked = {}
    for given, value in settings.items():
        if given in _REFUSED:
            raise UserError(f"setting {given} cannot be used here: {_REFUSED[given]}")
        if given not in known and any(issubclass(kind, PruneSettings) for kind in kinds):
            from nuteprune.train.config import NutePruneConfig  # which loads transformers

            hints = get_type_hints(NutePruneConfig)
            others = [x.name for x in dataclasses.fields(NutePruneConfig) if x.init]
            known = {x: (x, hints[x]) for x in others if x not in _REFUSED} | known
        if given not in known:
            raise UserError(f"unknown setting {_short(repr(given))}{did_you_mean(given, known)}")
        key, hint_of = known[given]
        if key in checked:
            raise UserError(f"setting {key} is given twice, once as {given}: pass it once")
        checked[key] = _coerce(given, value, hint_of)
    return checked


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Return a value as one of the types that a setting may have, as it is where it can be."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain = tuple(get_origin(kind) or kind for kind in kinds)
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, Number) and hasattr(value, "item"):  # NumPy's
        value = value.item()
    if isinstance(value, list) and list[str] in kinds:
        return [_coerce(key, item, str) for item in value]
    if type(value) in plain:
        return _finite(key, value)
    for kind in plain:
        with suppress(TypeError, ValueError, OverflowError):
            if isinstance(value, _MADE_OF.get(kind, ())) and not isinstance(value, bool):
                made = kind(value)
                if kind is not int or made == float(value):
                    return _finite(key, made)
    names = [kind.__name__ for kind in plain if kind in _PLAIN] or ["text"]
    raise UserError(
        f"setting {key} is {_short(reprlib.repr(value))}; it must be of type {' or '.join(names)}"
    )


_PLAIN = (bool, int, float, str, list, dict)
_MADE_OF: dict[type, Any] = {
    float: (int, str),
    int: (float, str),
    Path: (str, Path),
    str: (int, float, Path),
}
"""Type of a setting -> types of values that it is made of, where they say the same."""


def _finite(key: str, value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"setting {key} is {value}; it must be a finite number")
    return value


def _short(text: object) -> str:
    return textwrap.shorten(str(text), 200, placeholder=" ...")


@contextmanager
def settings_of_user() -> Iterator[None]:
    """Turn errors of libraries about settings into one line.

    Raises:
        UserError: in place of any other error.
    """
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise UserError(f"these settings cannot work ({said}); check the options") from error
