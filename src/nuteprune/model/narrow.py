"""Projections that compute only some of their rows and columns.

Fixed masks leave features that nobody reads. Not computing them saves as much as cutting them, and
the weights stay whole for the other role.

Shape suffixes: O rows (output features), I columns (input features).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Selection = tuple[Tensor | None, Tensor | None]
"""Indices of the rows and of the columns of a projection that are computed, None for all."""


def cut(weight_OI: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return some rows and columns of a weight."""
    if rows is not None:
        weight_OI = weight_OI.index_select(0, rows)
    if columns is not None:  # by rows of the transposed: on CPUs, columns are gathered one by one
        weight_OI = weight_OI.t().contiguous().index_select(0, columns).t()
    return weight_OI


def narrow_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, selected: Selection
) -> Tensor:
    """Return `x @ cut(weight).T + cut(bias)`; of a frozen weight, nothing cut stays in memory.

    Args:
        x: (..., selected columns).
        weight_OI: the whole weight.
        bias_O: the whole bias, frozen.
        selected: rows to compute, and columns that `x` has.

    Returns:
        (..., selected rows).
    """
    rows, _ = selected
    if bias_O is not None and rows is not None:
        bias_O = bias_O.index_select(0, rows)
    if weight_OI.requires_grad:
        return F.linear(x, cut(weight_OI, *selected), bias_O)
    return cast(Tensor, _FrozenNarrow.apply(x, weight_OI, bias_O, selected))


class _FrozenNarrow(torch.autograd.Function):
    """Cuts in the forward pass, and again in the backward pass: no copy lives in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, selected: Selection
    ) -> Tensor:
        ctx.save_for_backward(weight_OI, *selected)
        return F.linear(x, cut(weight_OI, *selected), bias_O)  # which autocast sees

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ cut(*ctx.saved_tensors).to(grad.dtype), None, None, None


class Narrow:
    """A linear module's forward, with the rows and columns selected at the time of a call.

    Args:
        module: whose forward it stands in for; its weight and state stay as they are.
        selected: called at each forward pass.
    """

    def __init__(self, module: nn.Linear, selected: Callable[[], Selection]) -> None:
        self._module, self._selected, self._whole = module, selected, module.forward

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the selected outputs (..., O) from the selected inputs (..., I)."""
        selected = self._selected()
        if all(part is None for part in selected):
            return self._whole(x)
        return narrow_linear(x, self._module.weight, self._module.bias, selected)
