"""How a setting is declared, and how run/settings.json keeps those of a run.

A declaration has name, default, help, choices, bounds and option in one place. Settings are fields
of dataclasses: `train.config` declares those of a run, `jobs.job` those of a whole job. Checks, the
command line, YAML files, `--set` and records are derived from the declarations. Resuming, reports
and records read run/settings.json.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuteprune.errors import UserError
from nuteprune.files import to_json
from nuteprune.run_folder import CHECKPOINT, SETTINGS

if TYPE_CHECKING:
    from nuteprune.train.config import RunArguments

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
SCHEMA = 2
"""Version of the file; 0.1.0 wrote one without."""
LEARNS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
)
"""transformers' settings that decide what is learned; the others only decide how."""
NOT_KEPT = frozenset(
    (
        *("output_dir", "disable_tqdm", "use_cpu", "logging_dir", "report_to", "debug"),
        *("dataloader_pin_memory", "accelerator_config", "sharded"),
        "costs",  # a table as a whole: jobs keep the name of its file, and a hash
        "ddp_find_unused_parameters",  # follows from the type of gates
        # What newer releases of transformers call gradient_checkpointing too.
        *("activation_checkpointing", "activation_checkpointing_kwargs"),
        "hub_token",  # a secret
    )
)
"""Settings that change no result, or that are nobody else's business."""


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
            raise UserError(f"{name} is {value!r}; must be one of {', '.join(map(str, x.choices))}")
    bounds = {name: x.bounds for name, x in ours.items() if x.bounds is not None}
    for name, (low, high) in {**TRAINER_BOUNDS, **bounds}.items():
        value = getattr(settings, name, None)
        if value is not None and not low <= value <= high:  # nor is it a number if it has no order
            limit = f"at most {high:g}" if value > high else f"at least {low:g}"
            raise UserError(f"{name} is {value}; it must be {limit}")


def run_settings(args: RunArguments, job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run: the declared ones, and others that were set.

    Args:
        args: the trainer's settings.
        job: the job's: model, data and so on; empty in a loop of one's own.

    Returns:
        Name -> value, fit for JSON.
    """
    kept = {name for name, x in declared(type(args)).items() if x.role != CALL}
    kept |= {*LEARNS, *chosen_settings(args)}
    found = {name: getattr(args, name) for name in sorted(kept)}
    plain = {k: v.value if isinstance(v, Enum) else v for k, v in {**job, **found}.items()}
    about = {"schema": SCHEMA, "nuteprune": version("nuteprune")}
    about["sequences_per_step"] = args.sequences_per_step
    settings: dict[str, Any] = json.loads(to_json({**about, **plain}))
    return settings


def chosen_settings(args: RunArguments) -> dict[str, Any]:
    """Return the settings that are not defaults, as far as they are for the record."""
    found = {}
    for x in dataclasses.fields(args):
        default = x.default if x.default_factory is dataclasses.MISSING else x.default_factory()
        value, usual = getattr(args, x.name), (default, args.FOLLOWING.get(x.name), None)
        if x.init and x.name not in NOT_KEPT and value not in usual:
            found[x.name] = value
    return found


def read_settings(run: Path) -> dict[str, Any]:
    """Return the settings of a run from its folder.

    Args:
        run: the folder of its checkpoints.

    Raises:
        UserError: if that is not there, damaged, or of a release that this one cannot go on with.
    """
    path = run / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{run} has no {SETTINGS}, which says what the run is: keep it beside {CHECKPOINT}N"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(settings, dict) or settings.get("schema") != SCHEMA:
        raise UserError(
            f"the run in {run} was begun by another release of nuteprune, most likely 0.1.0: "
            "finish it with that release, or start anew with --overwrite"
        )
    return settings


def check_same(run: Path, now: Mapping[str, Any], *kinds: type, also: Iterable[str] = ()) -> None:
    """Refuse to resume a run with other settings than its own.

    Args:
        run: the folder of its checkpoints.
        now: `run_settings` of the new command.
        kinds: the dataclasses that declare its settings; what they do not declare may differ.
        also: settings that may not differ, though they say how a run goes.

    Raises:
        UserError: naming the first setting that differs.
    """
    before = read_settings(run)
    compared = {k for kind in kinds for k, x in declared(kind).items() if x.role == WHAT}
    for key in sorted(compared | set(LEARNS) | set(also)):
        if before.get(key) != now.get(key):
            raise UserError(
                f"the run in {run} was started with {key} {before.get(key)}, not {now.get(key)}: "
                "resume with its own settings, or start anew with --overwrite"
            )
