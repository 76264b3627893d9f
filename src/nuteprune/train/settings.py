"""How a setting is declared: name, default, help, choices, bounds and option, all in one place.

Settings are fields of dataclasses: `train.config` declares those of a run, `jobs.job` those of a
whole job. Checks, the command line, YAML files, `--set`, records and commands that reproduce a run
are derived from the declarations.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
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
    """A setting as it was declared: what `setting` was given, the name and the type's text."""

    default: Any
    help: str
    choices: tuple[Any, ...]
    bounds: tuple[float, float] | None
    option: str | None
    role: str
    name: str = ""
    hint: str = ""

    @property
    def word(self) -> str:
        """What users call it: its option without dashes, where it has one."""
        return self.option.removeprefix("--").replace("-", "_") if self.option else self.name

    @property
    def flag(self) -> bool:
        """Whether its option stands alone, without a value."""
        return self.option is not None and self.hint.startswith("bool")

    @property
    def several(self) -> bool:
        """Whether its option may be repeated."""
        return self.option is not None and "list[str]" in self.hint


_FACTS: dict[Field[Any], Setting] = {}
# Not in the fields' metadata: transformers.HfArgumentParser passes all of that on to argparse.
_ITS_NAME = "--"


def setting(
    help: str,
    default: Any = None,
    *,
    choices: Sequence[Any] = (),
    bounds: tuple[float, float] | None = None,
    role: str = WHAT,
    name: str | None = None,
) -> Any:
    """Declare a field of a dataclass as a setting; `--set` reaches it.

    Args:
        help: one line for the user; `{default}` in it stands for the default.
        default: its default; MISSING: it must be given.
        choices: the values that it may have.
        bounds: its smallest and largest value.
        role: `WHAT`, `HOW` or `CALL`.
        name: its option on the command line; None: it has none. See `option`.
    """
    told = help.replace("{default}", str(default))
    made: Field[Any] = field(default=default, metadata={"help": told})
    _FACTS[made] = Setting(default, told, tuple(choices), bounds, name, role)
    return made


def option(help: str, default: Any = None, *, name: str = _ITS_NAME, **facts: Any) -> Any:
    """Declare a setting that has an option on the command line; see `setting`.

    An option of type `bool` stands alone, without a value; one whose type has `list[str]` may be
    repeated.

    Args:
        help: as for `setting`.
        default: as for `setting`.
        name: such as `--steps`; by default the field's own, without `target_`.
        **facts: as for `setting`.
    """
    return setting(help, default, name=name, **facts)


def declared(kind: type) -> dict[str, Setting]:
    """Return the settings that a dataclass declares by `setting`, by name, in their order."""
    found = {}
    for x in dataclasses.fields(kind):
        if (fact := _FACTS.get(x)) is not None:
            called = x.name.removeprefix("target_").replace("_", "-")
            option = f"--{called}" if fact.option == _ITS_NAME else fact.option
            found[x.name] = replace(fact, name=x.name, hint=str(x.type), option=option)
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
