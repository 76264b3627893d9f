"""How a setting is declared: name, default, help, choices, bounds and option, all in one place.

Settings are fields of dataclasses: `train.config` declares those of a run, `jobs.job` those of a
whole job. Checks, the command line, YAML files, `--set`, records and commands that reproduce a run
are derived from the declarations.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field
from typing import Any

from nuteprune.errors import UserError

WHAT, HOW, CALL = "what a run is", "how it is done", "what one call does"
"""Roles of a setting: a run is resumed with the same `WHAT`; the record keeps `HOW` as well."""
TRAINER_BOUNDS: Mapping[str, tuple[float, float]] = {
    "gradient_accumulation_steps": (1, 1e6),
    "save_steps": (1e-6, 1e9),
    "logging_steps": (1e-6, 1e9),
    "warmup_steps": (0, 1e9),
    "dataloader_num_workers": (0, 1024),
    "weight_decay": (0, 1e3),
    "max_grad_norm": (1e-12, 1e12),
    "adam_beta1": (0, 1 - 1e-9),
    "adam_beta2": (0, 1 - 1e-9),
    "adam_epsilon": (0, 1),
}
"""Smallest and largest value of what `transformers.TrainingArguments` declares without any."""


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Sequence[str] = (),
    bounds: tuple[float, float] | None = None,
    option: str | None = None,
    flag: bool = False,
    several: bool = False,
    role: str = WHAT,
) -> Any:
    """Declare a field of a dataclass as a setting.

    Args:
        default: its default; none: it must be given.
        help: one line for the user; `{default}` in it stands for the default.
        choices: the names that it may be.
        bounds: its smallest and largest value.
        option: its option on the command line, such as `--steps`; None: `--set` reaches it.
        flag: whether the option stands alone, without a value.
        several: whether the option may be repeated.
        role: `WHAT`, `HOW` or `CALL`.
    """
    facts = {
        "help": help.replace("{default}", str(default)),
        "choices": tuple(choices),
        "bounds": bounds,
        "option": option,
        "flag": flag,
        "several": several,
        "role": role,
    }
    return field(default=default, metadata=facts)


def declared(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the settings that a dataclass declares by `setting`, by name, in their order."""
    fields = {x.name: x for x in dataclasses.fields(kind) if "role" in x.metadata}
    order: dict[str, None] = {}
    for base in reversed(kind.__mro__):  # what a class declares anew stands where it does that
        for name in inspect.get_annotations(base):
            order.pop(name, None)
            order[name] = None
    return {name: fields[name] for name in order if name in fields}


def word(name: str, declaration: dataclasses.Field[Any]) -> str:
    """Return what users call a setting: its option without dashes, where it has one."""
    option = declaration.metadata["option"]
    return option.removeprefix("--").replace("-", "_") if option else name


def check_declared(settings: Any) -> None:
    """Refuse values that a setting's declaration rules out; None is left to who declares it.

    Raises:
        UserError: naming the setting and what it may be.
    """
    kind = type(settings)
    bounds = {name: x.metadata["bounds"] for name, x in declared(kind).items()}
    for name, x in declared(kind).items():
        value, choices = getattr(settings, name), x.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
    for name, limits in {**TRAINER_BOUNDS, **bounds}.items():
        value = getattr(settings, name, None)
        if limits is None or value is None:
            continue
        low, high = limits
        if not low <= value <= high:  # nor is it a number if it compares with none
            limit = f"at most {high:g}" if value > high else f"at least {low:g}"
            raise UserError(f"{name} is {value}; it must be {limit}")
