"""Structured pruning of language models, from the NutePrune paper (arXiv 2402.09773)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nuteprune.data.training_text import training_blocks as training_blocks
    from nuteprune.errors import RunFailed as RunFailed
    from nuteprune.errors import UserError as UserError
    from nuteprune.export.loading import load_pruned as load_pruned
    from nuteprune.jobs.prune import prune as prune
    from nuteprune.jobs.recover import recover as recover
    from nuteprune.jobs.vocab import vocab as vocab
    from nuteprune.stages.choose import choose as choose
    from nuteprune.stages.judge import judge as judge
    from nuteprune.stages.refit import refit as refit
    from nuteprune.stages.score import score as score
    from nuteprune.stages.slice import slice_model as slice_model
    from nuteprune.stages.write import write as write
    from nuteprune.train.config import NutePruneConfig as NutePruneConfig
    from nuteprune.train.first_stages import calibration_blocks as calibration_blocks
    from nuteprune.train.prepare import prepare as prepare
    from nuteprune.train.trainer import NutePruneTrainer as NutePruneTrainer


_HOMES = {
    **{x: f"stages.{x}" for x in ("choose", "judge", "refit", "score", "write")},
    **{x: f"jobs.{x}" for x in ("prune", "recover", "vocab")},
    "NutePruneConfig": "train.config",
    "NutePruneTrainer": "train.trainer",
    "RunFailed": "errors",
    "UserError": "errors",
    "calibration_blocks": "train.first_stages",
    "load_pruned": "export.loading",
    "prepare": "train.prepare",
    "slice_model": "stages.slice",
    "training_blocks": "data.training_text",
}
"""Public name -> the module that has it: jobs, the stages of a run, and the class for a loop."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import public names late: the command line sets what torch reads on import first."""
    if name in _HOMES:
        return getattr(import_module(f"nuteprune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'nuteprune' has no attribute {name!r}")
