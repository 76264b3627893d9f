"""Structured pruning of language models, from the NutePrune paper (arXiv 2402.09773)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nuteprune.errors import RunFailed, UserError
    from nuteprune.export.loading import load_pruned
    from nuteprune.jobs.prune import prune
    from nuteprune.jobs.recover import recover
    from nuteprune.jobs.vocab import vocab
    from nuteprune.train.config import NutePruneConfig
    from nuteprune.train.trainer import NutePruneTrainer

_HOMES = {
    "NutePruneConfig": "nuteprune.train.config",
    "NutePruneTrainer": "nuteprune.train.trainer",
    "RunFailed": "nuteprune.errors",
    "UserError": "nuteprune.errors",
    "load_pruned": "nuteprune.export.loading",
    "prune": "nuteprune.jobs.prune",
    "recover": "nuteprune.jobs.recover",
    "vocab": "nuteprune.jobs.vocab",
}

__all__ = [
    "NutePruneConfig",
    "NutePruneTrainer",
    "RunFailed",
    "UserError",
    "load_pruned",
    "prune",
    "recover",
    "vocab",
]


def __getattr__(name: str) -> Any:
    """Import public names late: the command line sets what torch reads on import first."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nuteprune' has no attribute {name!r}")
