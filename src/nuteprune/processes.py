"""The processes that share a run: whether there are several, and which of them this is.

torch is imported late: the command line sets what OpenMP reads on import first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def rank() -> int:
    """Return this process's number among those that a launcher started, 0 if none did."""
    return int(os.environ.get("RANK") or 0)


def is_main() -> bool:
    """Return whether this process speaks for the run."""
    return rank() == 0


def several_started() -> bool:
    """Return whether a launcher started several processes, joined or not yet."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def several() -> bool:
    """Return whether processes have been joined, so that they can tell each other something."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def agree(tensors: Iterable[Tensor]) -> None:
    """Give all processes the main one's values: computed alike is not equal to the bit."""
    from torch import distributed

    if several():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)
