"""Going on with a run: from which checkpoint, and only as the run that it is."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from transformers import TrainingArguments

from nuteprune.errors import UserError
from nuteprune.files import at_home, to_json, write_text
from nuteprune.jobs.job import Job
from nuteprune.jobs.sources import pick_dtype
from nuteprune.run_folder import RUN, SETTINGS
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.state import last_checkpoint
from nuteprune.train.trainer import NutePruneTrainer

OF_TRAINER = (
    *("seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    "max_grad_norm",
)
"""What transformers' settings say of what is learned; the others say how."""
FREE = ("target_sparsity", "stops", "gates", "sharded", "max_bad_steps")
"""Settings of our own that change nothing, or that `what_it_is` states in one form."""


def resume_from(job: Job) -> str | None:
    """Return the trainer checkpoint to go on from, None to start at the beginning."""
    checkpoint = last_checkpoint(job.out / RUN) if job.resume else None
    return str(checkpoint) if checkpoint else None


def what_it_is(job: Job, trainer: NutePruneTrainer) -> dict[str, Any]:
    """Return the settings that make a run this one, however they were spelled."""
    args = trainer.args
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(NutePruneConfig)} - inherited - set(FREE)
    return {
        "model": _place(job.model),
        "data": _place(job.data),
        "text_column": job.text_column,
        "length": job.length,
        "bits": job.bits,
        "dtype": str(pick_dtype(job.dtype, job.device)).removeprefix("torch."),
        "sparsity": list(trainer.targets),
        "gates": list(trainer.kinds),
        **{name: getattr(args, name) for name in sorted(own)},
        **{name: getattr(args, name) for name in OF_TRAINER},
    }


def remember(job: Job, trainer: NutePruneTrainer) -> None:
    """Write down what a run is that begins."""
    path = job.out / RUN / SETTINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json(what_it_is(job, trainer), indent=2) + "\n")


def check_same(job: Job, trainer: NutePruneTrainer) -> None:
    """Refuse to go on with a run as another.

    Raises:
        UserError: names the first setting that differs.
    """
    path = job.out / RUN / SETTINGS
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(to_json(what_it_is(job, trainer)))
    for key in now:
        if key in before and before[key] != now[key]:
            raise UserError(
                f"the run in --out {job.out} was started with {key} {before[key]}, not {now[key]}: "
                "resume with its own settings, or start anew with --overwrite"
            )


def _place(name: str) -> str:
    path = at_home(name)
    return str(path.resolve()) if path.exists() else name
