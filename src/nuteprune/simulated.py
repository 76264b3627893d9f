"""Helpers by which a run's code also runs on tensors without data, for plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")

watches: list[Any] = []
"""Who is told what tensors do not show: each `plan.live.Live` that counts; nobody in a run."""


def has_data(tensor: Tensor) -> bool:
    """Return whether a tensor has data."""
    return not isinstance(tensor, FakeTensor)


def usual(condition: Tensor) -> bool:
    """Return whether a condition holds; without data True, the usual case."""
    return bool(condition) if has_data(condition) else True


def number(value: Tensor) -> float:
    """Return a number; of one without data, 1."""
    return float(value) if has_data(value) else 1.0


def scored(value: Tensor) -> Tensor:
    """Return values on the CPU; random ones without data."""
    if has_data(value):
        return value.cpu()
    drawn = torch.rand(value.shape, generator=torch.Generator().manual_seed(value.numel()))
    return drawn.to(value.dtype)


def left(tensor: Tensor) -> Tensor:
    """Return a tensor that takes no memory of the device, or has a file behind it."""
    for watch in watches:
        watch.leave(tensor)
    return tensor


def summed(tensors: Iterable[Tensor]) -> None:
    """Tell that several processes would add these tensors up."""
    size = sum(x.nbytes for x in tensors) if watches else 0
    for watch in watches:
        watch.moved["summed"] += watch.times * size


def gather(module: nn.Module, how: str = "gathered", times: int = 1) -> None:
    """Tell that a sharded module's weights would be gathered, if they are not, up to `let_go`."""
    for watch in watches:
        watch.moved[how] += times * _frozen(module) * (not watch.whole)
        watch.whole += 1


def let_go() -> None:
    """Tell that weights of the last `gather` would be let go."""
    for watch in watches:
        watch.whole -= 1


def _frozen(module: nn.Module) -> int:
    """Return the bytes of a module's weights, without LoRA, which no process shares out."""
    return sum(x.nbytes for name, x in module.named_parameters() if "lora_" not in name)


def alike(parts: Sequence[T], tensor: Tensor) -> Iterator[T]:
    """Yield parts with equal work; without data only the first, counted for all.

    Args:
        parts: those to work on.
        tensor: one that the work uses.
    """
    if has_data(tensor):
        yield from parts
    elif parts:
        for watch in watches:
            watch.times *= len(parts)
        yield parts[0]
        for watch in watches:
            watch.times //= len(parts)


def once(work: Callable[[], T], tensor: Tensor, *sizes: int) -> T:
    """Return the result of work; without data, that of earlier work with the same sizes.

    Args:
        work: a function, by whose name it is known.
        tensor: one that the work uses.
        sizes: all that decides the products.
    """
    if has_data(tensor) or not watches:
        return work()
    found: T = watches[-1].once((work.__qualname__, *sizes), work)
    return found
