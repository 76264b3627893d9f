"""Names of the rankings, for help that loads nothing of what ranks."""

from __future__ import annotations

METHOD = "surgeon"
"""The ranking by default: docs/quality.md says why."""
METHOD_NAMES = (
    *("random", "magnitude", "wanda", "flap", "taylor", "fisher", METHOD),
    *("reconstruction", "reap", "frequency", "similarity"),
)
"""The keys of `gates.importance.METHODS`, in their order."""
