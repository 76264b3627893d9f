"""Runs on tensors without data: which of them are alive, and what is multiplied, by stretches."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nuteprune.simulated import watches

FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.linalg_cholesky_ex: lambda a, *_, **__: _cubes(a) // 3,
    torch.ops.aten.cholesky_inverse: lambda a, *_, **__: 2 * _cubes(a) // 3,
    torch.ops.aten.cholesky_solve: lambda b, a, *_, **__: 2 * b.numel() * a.shape[-1],
}
"""Multiplications and additions of dense operations: torch's counts, and those that it lacks."""

INSIDE: dict[Any, Callable[..., int]] = {
    torch.ops.aten.multinomial: lambda chances, *_: chances.nbytes,  # noise for each chance
    torch.ops.aten.cholesky_solve: lambda _, factor, *__: factor.nbytes,  # a copy for LAPACK
}
"""Bytes that operations hold inside of themselves, where they are many: measured on a CPU."""

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
"""Matrix products that layers and their gradients are made of in torch."""
HALF = (torch.bfloat16, torch.float16)


def _cubes(a: Tensor) -> int:
    return a.numel() * a.shape[-1]


def without_data(model: nn.Module) -> None:
    """Let a model's tensors on the meta device claim, without data, to be on the CPU."""
    mode, cpu = FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")
    made: dict[Tensor, Tensor] = {}

    def claimed(tensor: Tensor) -> Tensor:
        if tensor not in made:
            fake: Any = FakeTensor(mode, tensor.detach(), cpu)
            trained = tensor.requires_grad
            is_weight = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(fake, requires_grad=trained) if is_weight else fake
        return made[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = claimed(tensor)  # type: ignore[assignment]


class Live(TorchDispatchMode):
    """Counts the storages that operations make, while they live, and floating-point operations.

    `now` and `peak` are bytes. Temporary memory inside of operations is counted for those in
    `INSIDE` alone. `sizes` are those of products in half precision: a CPU's library makes a kernel
    for each, and keeps it. `fine` are those of `flops` that are not in half precision. A stage that
    tells `progress` of itself has a peak between each two times in `ticks`. `times` says how many
    times the products of the moment count. `moved` are the bytes that processes would send each
    other: `summed` up over them all; `gathered` by all of them where weights are sharded, once for
    all of the text; and `passed`, gathered for each pass through a module. `whole` says how many
    contexts hold gathered weights.
    """

    _done: ClassVar[dict[Any, tuple[Any, int, int, int]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = self.fine = 0
        self.times, self.whole = 1, 0
        self.moved = Counter[str]()
        self.sizes: set[Any] = set()
        self.ticks: list[int] = []
        self._known: dict[int, int] = {}

    def __enter__(self) -> Live:
        """Begin to count."""
        watches.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Count no more."""
        super().__exit__(*error)
        watches.remove(self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it made."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        packet = func._overloadpacket
        if packet in INSIDE:
            self.peak = max(self.peak, self.now + INSIDE[packet](*args))
        if packet in PRODUCTS and result.dtype in HALF:
            sides = [x for x in args if isinstance(x, Tensor)][-2:]
            self.sizes.add(tuple((*x.shape, *x.stride()) for x in sides))
        if packet in FLOPS:
            work = self.times * FLOPS[packet](*args, **kwargs, out_val=result)
            self.flops += work
            self.fine += work * (args[0].dtype not in HALF)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is let go, if it is not counted already."""
        if tensor.is_meta:  # a shape alone: no run gives it room
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += self._known[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._let_go, key)

    def progress(self, *_: Any) -> None:
        """Begin the next stretch of a stage, which has a peak of its own."""
        self.ticks.append(self.peak)
        self.peak = self.now

    def restart(self) -> None:
        """Count from here on; live tensors stay counted."""
        self.peak, self.flops, self.fine, self.ticks = self.now, 0, 0, []
        self.sizes.clear()
        self.moved.clear()

    def once(self, key: Any, work: Callable[[], Any]) -> Any:
        """Do some work, or count it as it was counted before under this key, in any run."""
        top, self.peak = self.peak, self.now
        if key not in self._done:
            flops, fine, begun = self.flops, self.fine, self.now
            times, self.times = self.times, 1
            result = work()
            self._done[key] = result, self.flops - flops, self.fine - fine, self.peak - begun
            self.flops, self.fine, self.times = flops, fine, times
        result, flops, fine, held = self._done[key]
        self.flops, self.fine = self.flops + flops * self.times, self.fine + fine * self.times
        self.peak = max(top, self.now + held)
        return result

    def leave(self, tensor: Tensor) -> None:
        """Stop counting a tensor's storage, though it lives."""
        self.count(tensor)
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            self.now -= self._known[key]
            self._known[key] = 0

    def _let_go(self, key: int) -> None:
        self.now -= self._known.pop(key)
