"""Cut stacked experts: whole ones, neurons of each, width.

Shape suffixes: E experts, F neurons of an expert, K kept ones, R rows of a stack, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nuteprune.gates.masks import Masks
from nuteprune.model.family import Experts, Projection


def kept_experts(masks: Masks, layer: int) -> Tensor:
    """Return the experts (E,) of a layer that masks keep."""
    every = torch.arange(masks.layout.shape.layers[layer].experts)
    part = masks.part("experts", layer)
    return every if part is None else every[(part > 0).cpu()]


def kept_neurons(masks: Masks, layer: int) -> Tensor:
    """Return the neurons (E, K) that masks keep of each expert that they keep."""
    whole, experts = masks.layout.shape.layers[layer], kept_experts(masks, layer)
    part = masks.part("expert_neurons", layer)
    if part is None:
        return torch.arange(whole.expert_neurons).expand(len(experts), -1)
    live = (part > 0).cpu().view(whole.experts, -1)[experts]
    return live.nonzero()[:, 1].view(len(experts), -1)


def cut_experts(
    state: dict[str, Tensor],
    prefix: str,
    entry: Experts,
    masks: Masks,
    layer: int,
    width_D: Tensor | None,
) -> None:
    """Cut a layer's stacks and its router in a state dict, in place.

    Args:
        state: tensors by the stock model's names.
        prefix: what the names of the layer's tensors begin with.
        entry: what the family's entry says of its experts.
        masks: the units to keep, with as many neurons for all experts of the layer.
        layer: the layer's index.
        width_D: hidden features that are kept, None for all.
    """
    whole = masks.layout.shape.layers[layer]
    experts = kept_experts(masks, layer)
    axes = {"expert_neurons": kept_neurons(masks, layer), "hidden": width_D}
    for projection in entry.projections:
        name = f"{prefix}{projection.path}"
        if name not in state:  # the block is gone
            return
        rows = _rows(projection, axes, whole.expert_neurons, entry.interleaved)
        row_dim = 2 if entry.transposed else 1
        stack = _take(_take(state[name], experts, 0), rows, row_dim)
        state[name] = _take(stack, axes[projection.columns], 3 - row_dim)
        if (bias := f"{name}_bias") in state:
            state[bias] = _take(_take(state[bias], experts, 0), rows, 1)
    if (gate := f"{prefix}{entry.shared_gate}.weight") in state:
        state[gate] = _take(state[gate], width_D, 1)
    for name in [x for x in state if x.startswith(f"{prefix}{entry.router}.")]:
        if len(state[name]) == whole.experts:
            state[name] = _take(state[name], experts, 0)
            if state[name].dim() == 2:
                state[name] = _take(state[name], width_D, 1)


def _rows(
    projection: Projection, axes: Mapping[str, Any], width: int, interleaved: bool
) -> Tensor | None:
    """Return the rows of a stack that are kept: (R,), or (E, R) where experts differ."""
    if projection.rows == ("hidden",):
        return axes["hidden"]  # type: ignore[no-any-return]
    neurons_EK, several = axes["expert_neurons"], len(projection.rows)
    each = torch.arange(several)
    if interleaved:
        return (neurons_EK.unsqueeze(-1) * several + each).flatten(1)  # type: ignore[no-any-return]
    return (neurons_EK.unsqueeze(1) + width * each.unsqueeze(-1)).flatten(1)  # type: ignore[no-any-return]


def _take(tensor: Tensor, index: Tensor | None, dim: int) -> Tensor:
    """Return a tensor's entries along a dimension, by an index (K,), or (E, K) for each expert."""
    if index is None:
        return tensor
    index = index.to(tensor.device)
    if index.dim() == 1:
        return tensor.index_select(dim, index)
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = index.shape
    return torch.take_along_dim(tensor, index.view(shape), dim)
