"""The trainer of a prune job: its settings, its progress, and what it cannot do for a wrapper."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from nuteprune.console import Bars
from nuteprune.data.blocks import BlockDataset
from nuteprune.errors import UserError
from nuteprune.export.wrapping import Around
from nuteprune.files import to_json
from nuteprune.jobs.job import PruneJob, what_it_is
from nuteprune.jobs.progress import StepProgress
from nuteprune.jobs.settings import settings_of_user
from nuteprune.jobs.sources import around, pick_device, stored_dtype
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.targets import COUNTED
from nuteprune.train.trainer import NutePruneTrainer


def trainer_config(job: PruneJob, folder: Path) -> NutePruneConfig:
    """Return the settings of a job's trainer.

    Args:
        job: the job.
        folder: the run's folder.

    Raises:
        UserError: if they cannot work.
    """
    bookkeeping = {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 2}
    here = {"disable_tqdm": True, "use_cpu": pick_device(job.device) == "cpu"}
    with settings_of_user():
        return NutePruneConfig(output_dir=str(folder), **{**bookkeeping, **job.settings, **here})


def make_trainer(
    job: PruneJob,
    model: PreTrainedModel,
    config: NutePruneConfig,
    training: BlockDataset,
    tokenizer: PreTrainedTokenizerBase,
    bars: Bars,
) -> NutePruneTrainer:
    """Return a trainer that shows its progress."""
    with settings_of_user():
        trainer = NutePruneTrainer(
            model,
            config,
            training,
            tokenizer,
            progress=bars.update,
            stored_dtype=stored_dtype(model),
            job={**what_it_is(job), **_of_table(job, config)},
        )
        trainer.check_optimizer()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepProgress(trainer, bars))
    return trainer


def _of_table(job: PruneJob, config: NutePruneConfig) -> dict[str, str]:
    """Return the hash of the table of costs that was named, which says what units go."""
    named = job.settings.get("costs") is not None and config.target_speedup is not None
    if not (named and isinstance(config.costs, Mapping)):
        return {}
    return {"costs": hashlib.blake2b(to_json(config.costs).encode(), digest_size=8).hexdigest()}


def check_priced(job: PruneJob, config: NutePruneConfig) -> None:
    """Refuse a size of a model of several modalities: its language model alone has a price.

    Raises:
        UserError: naming what to pass instead.
    """
    kind = config.asked[0].kind
    if kind in COUNTED and outside(job) is not None:
        raise UserError(
            f"--{kind.replace('_', '-')} cannot be used here: {job.model} has parts for images "
            "beside its language model, which are not priced; pass --sparsity, or "
            "--set text_only=true"
        )


def check_wrapper(job: PruneJob, trainer: NutePruneTrainer) -> None:
    """Refuse what cannot be put back into a wrapper, and a wrapper that is not whole.

    A narrower model cannot be put back, nor a mixture of free shapes.

    Raises:
        UserError: naming what to do instead.
    """
    if (whole := outside(job)) is None:
        return
    constraints = trainer.allocator.constraints
    if trainer.allocator.budget.per_token and not constraints.uniform:
        raise UserError(
            f"free shapes cannot be used here: {job.model} holds a mixture of experts within a "
            "model of several modalities; pass --shapes uniform, or --set text_only=true"
        )
    if "hidden" in constraints.kinds:
        raise UserError(
            f"gates on hidden cannot be used here: what {job.model} makes of images is as wide as "
            "its language model; leave hidden out of --gates, or pass --set text_only=true"
        )
    whole.check()


def outside(job: PruneJob) -> Around | None:
    """Return what is written around the pruned language model; None where nothing is."""
    return None if job.text_only else around(job.model)
