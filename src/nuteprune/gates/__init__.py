"""What is removed: masks, scores, the parameter budget, and the knapsack that chooses.

The names of the rankings are here, for help that loads nothing of what ranks.
"""

from __future__ import annotations

METHOD = "surgeon"
"""The ranking by default: docs/quality.md says why."""
METHOD_NAMES = (
    *("random", "wanda", "flap", "taylor", "fisher", METHOD),
    *("reconstruction", "reap", "similarity"),
)
"""The keys of `gates.importance.METHODS`, in their order."""
