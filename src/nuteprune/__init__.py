"""Structured pruning of language models, from the NutePrune paper (arXiv 2402.09773)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nuteprune.data.blocks import training_blocks
    from nuteprune.data.calibration import calibration_blocks
    from nuteprune.errors import RunFailed, UserError
    from nuteprune.export.loading import load_pruned
    from nuteprune.jobs.prune import prune
    from nuteprune.jobs.recover import recover
    from nuteprune.jobs.vocab import vocab
    from nuteprune.stages.cut import choose, refit, score
    from nuteprune.stages.judge import judge
    from nuteprune.stages.slice import slice_model
    from nuteprune.stages.write import write
    from nuteprune.train.config import NutePruneConfig
    from nuteprune.train.prepare import prepare
    from nuteprune.train.trainer import NutePruneTrainer

_HOMES = {
    **{x: f"stages.{x}" for x in ("judge", "write")},
    **dict.fromkeys(("choose", "refit", "score"), "stages.cut"),
    **{x: f"jobs.{x}" for x in ("prune", "recover", "vocab")},
    "NutePruneConfig": "train.config",
    "NutePruneTrainer": "train.trainer",
    "RunFailed": "errors",
    "UserError": "errors",
    "calibration_blocks": "data.calibration",
    "load_pruned": "export.loading",
    "prepare": "train.prepare",
    "slice_model": "stages.slice",
    "training_blocks": "data.blocks",
}
"""Public name -> the module that has it: jobs, the stages of a run, and the class for a loop."""

__all__ = [
    "NutePruneConfig",
    "NutePruneTrainer",
    "RunFailed",
    "UserError",
    "calibration_blocks",
    "choose",
    "judge",
    "load_pruned",
    "prepare",
    "prune",
    "recover",
    "refit",
    "score",
    "slice_model",
    "training_blocks",
    "vocab",
    "write",
]


def __getattr__(name: str) -> Any:
    """Import public names late: the command line sets what torch reads on import first."""
    if name in _HOMES:
        return getattr(import_module(f"nuteprune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'nuteprune' has no attribute {name!r}")
