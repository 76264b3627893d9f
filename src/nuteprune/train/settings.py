"""How a setting is declared: name, default, help, choices, bounds and option, all in one place.

Settings are fields of dataclasses: `train.config` declares those of a run, `jobs.job` those of a
whole job. Checks, the command line, YAML files, `--set`, records and commands that reproduce a run
are derived from the declarations.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, replace
from typing import Any

from nuteprune.errors import UserError

WHAT, HOW, CALL = "what a run is", "how it is done", "what one call does"
"""Roles of a setting: a run is resumed with the same `WHAT`; the record keeps `HOW` as well."""
TRAINER_BOUNDS: Mapping[str, tuple[float, float]] = {
    "gradient_accumulation_steps": (1, 1e6),
    "per_device_train_batch_size": (1, 1e6),
    "learning_rate": (1e-12, 1e3),
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


@dataclass(frozen=True)
class Setting:
    """A setting as it was declared: its name, and what `setting` was given."""

    name: str
    default: Any
    help: str
    choices: tuple[Any, ...]
    bounds: tuple[float, float] | None
    option: str | None
    flag: bool
    several: bool
    role: str

    @property
    def word(self) -> str:
        """What users call it: its option without dashes, where it has one."""
        return self.option.removeprefix("--").replace("-", "_") if self.option else self.name


_FACTS: dict[Field[Any], Setting] = {}
# Not in the fields' metadata: transformers.HfArgumentParser passes all of that on to argparse.


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Sequence[Any] = (),
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
        choices: the values that it may have.
        bounds: its smallest and largest value.
        option: its option on the command line, such as `--steps`; None: `--set` reaches it.
        flag: whether the option stands alone, without a value.
        several: whether the option may be repeated.
        role: `WHAT`, `HOW` or `CALL`.
    """
    told = help.replace("{default}", str(default))
    made: Field[Any] = field(default=default, metadata={"help": told})
    _FACTS[made] = Setting("", default, told, tuple(choices), bounds, option, flag, several, role)
    return made


def declared(kind: type) -> dict[str, Setting]:
    """Return the settings that a dataclass declares by `setting`, by name, in their order."""
    ours = [x for x in dataclasses.fields(kind) if x in _FACTS]
    found = {x.name: replace(_FACTS[x], name=x.name) for x in ours}
    order: dict[str, None] = {}
    for base in reversed(kind.__mro__):  # what a class declares anew stands where it does that
        for name in inspect.get_annotations(base):
            order.pop(name, None)
            order[name] = None
    return {name: found[name] for name in order if name in found}


def check_declared(settings: Any) -> None:
    """Refuse values that a setting's declaration rules out; its class checks None.

    Raises:
        UserError: naming the setting and what it may be.
    """
    ours = declared(type(settings))
    for name, x in ours.items():
        value = getattr(settings, name)
        if x.choices and value is not None and value not in x.choices:
            raise UserError(
                f"{name} is {value!r}; it must be one of {', '.join(map(str, x.choices))}"
            )
    bounds = {name: x.bounds for name, x in ours.items()}
    for name, limits in {**TRAINER_BOUNDS, **bounds}.items():
        value = getattr(settings, name, None)
        if limits is None or value is None:
            continue
        low, high = limits
        if not low <= value <= high:  # nor is it a number if it compares with none
            limit = f"at most {high:g}" if value > high else f"at least {low:g}"
            raise UserError(f"{name} is {value}; it must be {limit}")
