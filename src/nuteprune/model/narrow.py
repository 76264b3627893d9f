"""Projections that compute with some of their rows and columns alone.

Masks that are fixed make features that nobody reads; leaving them out saves what cutting them out
would save, while the weights stay whole for the other role.

Shape suffixes: O rows (output features), I columns (input features).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Kept = tuple[Tensor | None, Tensor | None]
"""Indices of the rows and of the columns of a projection that are computed, None for all."""


def cut(weight_OI: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return some rows and columns of a weight."""
    if rows is not None:
        weight_OI = weight_OI.index_select(0, rows)
    if columns is not None:  # by rows of the transposed: on CPUs, columns are gathered one by one
        weight_OI = weight_OI.t().contiguous().index_select(0, columns).t()
    return weight_OI


def narrow_linear(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
) -> Tensor:
    """Return `x @ cut(weight).T + cut(bias)`; of a frozen weight, nothing cut stays in memory.

    Args:
        x: (..., kept columns).
        weight_OI: the whole weight.
        bias_O: the whole bias, frozen.
        rows: output features to compute, None for all.
        columns: input features that `x` has, None for all.

    Returns:
        (..., kept rows).
    """
    if bias_O is not None:
        bias_O = bias_O if rows is None else bias_O.index_select(0, rows)
    if weight_OI.requires_grad:
        return F.linear(x, cut(weight_OI, rows, columns), bias_O)
    return cast(Tensor, _FrozenNarrow.apply(x, weight_OI, bias_O, rows, columns))


class _FrozenNarrow(torch.autograd.Function):
    """Cuts in the forward pass, and again in the backward pass: no copy lives in between."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight_OI, rows, columns)
        place = x.device.type
        dtype = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else x.dtype
        ctx.dtypes = x.dtype, dtype
        bias_O = None if bias_O is None else bias_O.to(dtype)
        return F.linear(x.to(dtype), cut(weight_OI, rows, columns).to(dtype), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        given, computed = ctx.dtypes
        grad_x = grad @ cut(*ctx.saved_tensors).to(computed)
        return grad_x.to(given), None, None, None, None


class Narrow:
    """Lets a linear module compute with the rows and columns that are kept at the time of a call.

    Args:
        module: its `forward` is replaced; its weight and state stay as they are.
        kept: asked at each call.
    """

    def __init__(self, module: nn.Linear, kept: Callable[[], Kept]) -> None:
        self._module, self._kept, self._whole = module, kept, module.forward
        module.forward = self  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        """Compute (..., O) from (..., I), of both what is kept."""
        rows, columns = self._kept()
        if rows is None and columns is None:
            return self._whole(x)
        return narrow_linear(x, self._module.weight, self._module.bias, rows, columns)

    def remove(self) -> None:
        """Give the module back what it had: its class's own, or what was there before."""
        if isinstance(self._whole, Narrow):
            self._module.forward = self._whole  # type: ignore[assignment]
        else:
            del self._module.forward
