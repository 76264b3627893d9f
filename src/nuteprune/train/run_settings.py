"""Writes and reads run/settings.json, which has a run's settings.

Resuming, reports, records, and `eval` of an unfinished run read it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nuteprune.errors import UserError
from nuteprune.files import to_json
from nuteprune.run_folder import CHECKPOINT, SETTINGS
from nuteprune.train.config import RunArguments
from nuteprune.train.settings import CALL, WHAT, declared

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


def run_settings(args: RunArguments, job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run: the declared ones, and others that were set.

    Args:
        args: the trainer's settings.
        job: the job's: model, data and so on; empty in a loop of one's own.

    Returns:
        Name -> value, fit for JSON.
    """
    kept = {name for name, x in declared(type(args)).items() if x.role != CALL}
    kept |= set(LEARNS) | set(_changed(args))
    found = {name: getattr(args, name) for name in sorted(kept)}
    plain = {k: v.value if isinstance(v, Enum) else v for k, v in {**job, **found}.items()}
    about: dict[str, Any] = {"schema": SCHEMA, "nuteprune": version("nuteprune")}
    about["sequences_per_step"] = args.sequences_per_step
    settings: dict[str, Any] = json.loads(to_json({**about, **plain}))
    return settings


def chosen_settings(args: RunArguments) -> dict[str, Any]:
    """Return the settings that are not defaults, as far as they are for the record."""
    return {name: getattr(args, name) for name in _changed(args)}


def _changed(args: RunArguments) -> list[str]:
    found = []
    for field in dataclasses.fields(args):
        makes = field.default_factory
        default = field.default if makes is dataclasses.MISSING else makes()
        usual = (default, args.FOLLOWING.get(field.name), None)
        if field.init and field.name not in NOT_KEPT and getattr(args, field.name) not in usual:
            found.append(field.name)
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
