"""The processes that share a run: which of them this is, and how they share work out.

torch is imported late: the command line sets what OpenMP reads on import first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nuteprune.errors import RunFailed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

OTHER_ENDED = "another process of this run has ended; its own line says why"
BY_PEER = "by peer"
"""What is in an error of gloo whose connection another process closed, or reset as it ended."""


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


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over text on a device: that of `Team.add_up`, see there.

    Apple's GPUs know no 64 bits; no processes share them.
    """
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def agree(tensors: Iterable[Tensor]) -> None:
    """Give all processes the main one's values: their own may differ in the last bits."""
    from torch import distributed

    if several():
        for tensor in tensors:
            _send(tensor, lambda sent: distributed.broadcast(sent, src=0))


@dataclass(frozen=True)
class Team:
    """Processes that share work out: each does its part, and the parts are added up.

    All of them have the same model and text. So all call `add_up` and `by_rows`, in one order.
    How text is cut into batches does not depend on how many they are. What they add up is in fp64:
    rounded to fp32, a sum is then the same whatever the order of its terms, but for one sum in
    millions. So however many they are, they find the same units and weights.
    A sharded model's passes are of all processes together: each has to make as many.

    Args:
        rank: which of them this is.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def is_mine(self, index: int) -> bool:
        """Return whether an item that is dealt out by its index is this process's."""
        return index % self.size == self.rank

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's share of items; it may be none."""
        return items[self.rank :: self.size]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over the processes: the same bits in each of them.

        Raises:
            RunFailed: if another process has ended.
        """
        from torch import distributed

        from nuteprune.simulated import summed

        if self.size == 1:
            summed(tensors)
            return
        for tensor in tensors:
            _send(tensor, distributed.all_reduce)

    def by_rows(self, rows: int, work: Callable[[slice], Tensor], together: int = 1) -> Tensor:
        """Return the rows (rows, ...) that some work gives, each process doing its own.

        All do as many, the last ones perhaps some that others do too.

        Args:
            rows: how many there are, at least 1.
            work: makes some of them.
            together: how many are made together: a share begins at a multiple of it.

        Raises:
            RunFailed: if another process has ended.
        """
        if self.size == 1:
            whole = work(slice(None))
            self.add_up([whole])
            return whole
        groups = -(-rows // together)
        each = -(-groups // self.size)
        first = self.rank * each
        begins = min(first, groups - each)
        part = work(slice(begins * together, (begins + each) * together))
        whole = part.new_zeros(rows, *part.shape[1:])
        own = part[(first - begins) * together :]
        whole[first * together : first * together + len(own)] = own
        self.add_up([whole])
        return whole


ALONE = Team()
"""A process that does all work itself."""


def everyone() -> Team:
    """Return all processes of the run."""
    from torch import distributed

    return Team(distributed.get_rank(), distributed.get_world_size()) if several() else ALONE


def _send(tensor: Tensor, send: Callable[[Tensor], object]) -> None:
    """Let processes change a tensor together, on the device that they send from.

    Raises:
        RunFailed: if another process has ended.
    """
    from torch import distributed

    on_device = distributed.get_backend() == "nccl"
    sent = (tensor.cuda() if on_device else tensor).contiguous()
    try:
        send(sent)
    except RuntimeError as error:
        raise RunFailed(OTHER_ENDED) from error
    if sent is not tensor:
        tensor.copy_(sent)


def somewhere(holds: bool) -> bool:
    """Return whether something holds in any of the run's processes; all of them ask."""
    import torch

    count = torch.tensor(float(holds))
    everyone().add_up([count])
    return bool(count > 0)


def main_ones(found: T) -> T:
    """Return what the main process has found, a plain Python value, in all processes."""
    if not several():
        return found
    from torch import distributed

    sent = [found]
    distributed.broadcast_object_list(sent, src=0)
    return sent[0]


def share(found: dict[str, Tensor] | None, values: bool = True) -> dict[str, Tensor] | None:
    """Broadcast the main process's tensors, or their shapes alone; None if it has none."""
    if not several():
        return found
    import torch

    form = {k: (tuple(v.shape), v.dtype) for k, v in found.items()} if found is not None else None
    if (forms := main_ones(form)) is None:
        return None
    if found is None:  # this is not the main process
        where = None if values else "meta"
        found = {k: torch.empty(s, dtype=d, device=where) for k, (s, d) in forms.items()}
    if values:
        agree(found.values())
    return found
