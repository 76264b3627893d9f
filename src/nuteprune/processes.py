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
    """Return this process's rank, 0 without a launcher."""
    return int(os.environ.get("RANK") or 0)


def is_main() -> bool:
    """Return whether this is the main process, which prints and writes."""
    return rank() == 0


def several_started() -> bool:
    """Return whether a launcher started several processes, with a process group or not yet."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def several() -> bool:
    """Return whether a process group of several processes exists."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def agree(tensors: Iterable[Tensor]) -> None:
    """Give all processes the main one's values: their own may differ in the last bits."""
    from torch import distributed

    if several():
        on_device = distributed.get_backend() == "nccl"
        for tensor in tensors:
            sent = tensor.cuda() if on_device else tensor
            distributed.broadcast(sent, src=0)
            if sent is not tensor:
                tensor.copy_(sent)


def share(found: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Broadcast the main process's tensors; None if it has none."""
    if not several():
        return found
    import torch
    from torch import distributed

    form = {k: (tuple(v.shape), v.dtype) for k, v in found.items()} if found is not None else None
    sent: list[dict[str, tuple[tuple[int, ...], torch.dtype]] | None] = [form]
    distributed.broadcast_object_list(sent, src=0)
    if (forms := sent[0]) is None:
        return None
    here = found if is_main() else {k: torch.empty(s, dtype=d) for k, (s, d) in forms.items()}
    assert here is not None
    agree(here.values())
    return here
