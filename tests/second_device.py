"""A second device for tests, where there is no accelerator: it computes on the CPU, but apart.

Its tensors say that they are on cuda:0. As there, one of them may not meet a tensor of the CPU in
an operation, unless that is a single number, an index, or what is copied. Operations whose result
the program reads, for which an accelerator would be waited for, are counted. So is what is copied
there.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map
from transformers import TrainingArguments

from nuteprune import products
from nuteprune.memory import mapped
from nuteprune.model import lora, weights
from nuteprune.plan.live import Live
from nuteprune.stages import slice as cutting

DEVICE = torch.device("cuda:0")
ATEN = torch.ops.aten
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
INDEXED = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default}
PRODUCTS = {ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.linear.default}
READS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.equal.default}


class There(Tensor):
    """A tensor on the second device.

    Args:
        inner: its data, on the CPU.
    """

    inner: Tensor
    is_meta = is_cpu = False
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        # A shell without data: what runs below autograd sees the data instead.
        there: Any = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        there.inner = inner
        return there

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, There)
        self.inner = value.inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Where the mode is not, as in other threads.
        return SecondDevice.current.__torch_dispatch__(func, types, args, kwargs)


class SecondDevice(TorchDispatchMode):
    """Within this mode there is the second device.

    `reads` counts operations that wait for it, by the function that asks. `arrivals` counts what
    lives of the tensors that were copied there from the CPU, `arrived` the bytes of all of them.
    """

    current: SecondDevice

    def __init__(self) -> None:
        super().__init__()
        SecondDevice.current = self
        self.reads: Counter[str] = Counter()
        self.arrivals = Live()
        self.arrived = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not {type(x) for x in given} <= {Tensor, nn.Parameter, There}:
            if func is ATEN._to_copy.default and kwargs.get("device") != torch.device("cpu"):
                return args[0].detach()  # it says that it is there already
            return NotImplemented  # to be taken apart by those whose type it is
        if func._overloadpacket is ATEN.to:  # below autograd it comes whole
            with self:
                return func.decompose(*args, **kwargs)
        ours = any(isinstance(x, There) for x in given)
        others = [x for x in given if not isinstance(x, There) and x.dim() > 0]
        if ours and func in INDEXED:
            others = [x for x in others if x is args[0]]
        if ours and others and func not in COPIES:
            shapes = [tuple(x.shape) for x in others]
            raise RuntimeError(f"{func} met tensors on {DEVICE} and on cpu, {shapes}")
        place = kwargs.get("device")
        if place is not None:
            result_is_ours = place.type != "cpu"
            kwargs = {**kwargs, "device": torch.device("cpu")}
        else:
            result_is_ours = isinstance(args[0], There) if func in COPIES else ours
        if ours and (func in READS or (func in COPIES and not result_is_ours)):
            self.reads[_reader()] += 1
        plain = tree_map(lambda x: x.inner if isinstance(x, There) else x, (args, kwargs))
        if func in PRODUCTS:
            # What was cast in the forward pass is not cast any more in the backward pass.
            dtype = Autocast.dtype or min((x.dtype for x in given), key=lambda x: x.itemsize)
            plain = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) else x, plain)
        result = func(*plain[0], **plain[1])
        if result_is_ours:
            result = tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, result)
            if func in COPIES and not ours:
                self.arrivals.count(result.inner)
                self.arrived += result.inner.nbytes
        return return_and_correct_aliasing(func, args, kwargs, result)


def _reader() -> str:
    """Return the function, outside of torch and of this file, that the present call comes from."""
    frame = sys._getframe()
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in ("torch", "tests"):
        frame = frame.f_back
    return f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"


class Autocast(torch.autocast):
    """Autocast of the second device: products alone."""

    dtype: torch.dtype | None = None

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)

    def __enter__(self) -> Any:
        self.before, Autocast.dtype = Autocast.dtype, self.fast_dtype if self._enabled else None
        return self

    def __exit__(self, *_: Any) -> None:
        Autocast.dtype = self.before


def _let_weights_be_away(patch: pytest.MonkeyPatch) -> None:
    """Let weights that are offloaded say that they are on the second device, as `There` does."""
    make = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
    shell = staticmethod(lambda cls, *args, **how: make(cls, *args, **{**how, "device": "meta"}))
    patch.setattr(Tensor, "_make_wrapper_subclass", shell)
    for name in ("device", "is_meta", "is_cpu", "is_cuda"):
        patch.setattr(weights.Away, name, vars(There)[name], raising=False)
    # safetensors cannot read within a mode.
    patch.setattr(products, "read_tensors", _disable_current_modes()(products.read_tensors))
    outside = _disable_current_modes()(mapped)
    for module in (weights, cutting, lora):
        patch.setattr(module, "mapped", outside)


@contextmanager
def second_device(patch: pytest.MonkeyPatch) -> Iterator[SecondDevice]:
    """Within this context there is the second device, and Trainer trains on it."""
    generator = torch.Generator
    patch.setattr(torch, "Generator", lambda device="cpu": generator())
    patch.setattr(torch, "autocast", Autocast)
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(TrainingArguments, "device", DEVICE)
    patch.setattr(Accelerator, "device", DEVICE)
    _let_weights_be_away(patch)
    # The model is there already. Moving it again would give it parameters that nobody optimizes.
    patch.setattr(Accelerator, "prepare_model", lambda self, model, *args, **kwargs: model)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # `torch.tensor` makes tensors here and moves them, as an operation that the mode sees.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with SecondDevice() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(before)
