"""Cut pruned rows and columns out of a model, layer by layer: smaller tensors, the same function.

Shape suffixes: D hidden width, E experts that are kept, K kept neurons of each.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from nuteprune.gates.masks import Masks, kept_features, kept_parts, kept_units, live_groups
from nuteprune.memory import give_back
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Experts
from nuteprune.model.shape import LayerShape, Shape
from nuteprune.shrink.finalize import fold_layer, fold_outside, put, scale, scale_norm


def shape_of(masks: Masks) -> Shape:
    """Return the dimensions that masks leave (non-zero entries)."""
    layers = []
    for i, old in enumerate(masks.layout.shape.layers):
        kept = old
        if (heads := masks.heads(i)) is not None:
            groups = live_groups(heads, old)
            kept = replace(kept, heads=int((heads > 0).sum()), kv_heads=int(groups.sum()))
        if (neurons := masks.part("neurons", i)) is not None:
            kept = replace(kept, neurons=int((neurons > 0).sum()))
        if old.experts:
            experts, expert_neurons = _kept_neurons(masks, i).shape
            kept = replace(kept, experts=experts, expert_neurons=expert_neurons)
        if not _open(masks.part("attn_block", i)):
            kept = replace(kept, heads=0, kv_heads=0, mixer=False)
        if not _open(masks.part("mlp_block", i)):
            kept = replace(kept, neurons=0, experts=0, expert_neurons=0)
        layers.append(kept)
    hidden = masks.hidden
    width = masks.layout.shape.hidden if hidden is None else int((hidden > 0).sum())
    return Shape(width, tuple(layers))


def _open(gate: Tensor | None) -> bool:
    return gate is None or bool((gate > 0).all())


def _kept_experts(masks: Masks, layer: int) -> Tensor:
    """Return the experts (E,) of a layer that masks keep."""
    kept = kept_units(masks.part("experts", layer))
    return torch.arange(masks.layout.shape.layers[layer].experts) if kept is None else kept


def _kept_neurons(masks: Masks, layer: int) -> Tensor:
    """Return the neurons (E, K) that masks keep of each expert that they keep."""
    whole, experts = masks.layout.shape.layers[layer], _kept_experts(masks, layer)
    part = masks.part("expert_neurons", layer)
    if part is None:
        return torch.arange(whole.expert_neurons).expand(len(experts), -1)
    live = (part > 0).cpu().view(whole.experts, -1)[experts]
    return live.nonzero()[:, 1].view(len(experts), -1)


Tensors = dict[str, Tensor]


def cut_state(anatomy: Anatomy, masks: Masks) -> Tensors:
    """Return the weights of the smaller model, by the stock model's names; see `cut_part`."""
    parts = (*range(len(anatomy.layers)), None)
    return {name: x for part in parts for name, x in cut_part(anatomy, masks, part).items()}


@torch.no_grad()
def cut_part(anatomy: Anatomy, masks: Masks, layer: int | None) -> Tensors:
    """Fold masks into a layer's weights, and return those that are left; the layer is freed.

    Args:
        anatomy: a model without adapters; it is used up.
        masks: the units to keep (non-zero entries), in an exportable shape.
        layer: the layer; None: what is outside of layers, which comes last.

    Returns:
        Tensors by the stock model's names.
    """
    shape = shape_of(masks)
    ratio = math.sqrt(masks.layout.shape.hidden / shape.hidden)
    if layer is not None:
        fold_layer(anatomy, masks, layer)
        if ratio != 1:
            _rescale_layer(anatomy, layer, ratio)
        state = _cut_layer(anatomy, masks, layer, shape.layers[layer])
    else:
        fold_outside(anatomy, masks)
        if ratio != 1:
            _rescale_outside(anatomy, ratio)
        state = _cut_outside(anatomy, masks)
    let_go(anatomy.model if layer is None else anatomy.layers[layer])
    give_back()
    return state


def let_go(module: nn.Module) -> None:
    """Drop a module's parameters."""
    for part in module.modules():
        part._parameters = dict.fromkeys(part._parameters)


def _cut_layer(anatomy: Anatomy, masks: Masks, layer: int, kept: LayerShape) -> Tensors:
    family, whole = anatomy.family, masks.layout.shape.layers[layer]
    prefix = f"{family.layers}.{layer}."
    tensors = anatomy.layers[layer].state_dict()
    state = {prefix + name: x for name, x in tensors.items() if not _gone(anatomy, name, kept)}
    heads, width_D = masks.heads(layer), kept_units(masks.hidden)
    index = kept_features(heads, masks.part("neurons", layer), whole, anatomy.head_dim)
    if width_D is not None:
        index["hidden"] = width_D
    for path, (rows, columns) in kept_parts(family, index, whole, anatomy.head_dim).items():
        _select(state, f"{prefix}{path}.weight", rows, 0)
        _select(state, f"{prefix}{path}.weight", columns, 1)
        _select(state, f"{prefix}{path}.bias", rows, 0)
    if family.experts is not None and kept.experts:
        _cut_experts(state, prefix, family.experts, masks, layer)
    for path in family.norms:
        _select(state, f"{prefix}{path}.weight", width_D, 0)
    for path in family.per_head:
        _select(state, f"{prefix}{path}", kept_units(heads), 0)
    return state


def _cut_experts(state: Tensors, prefix: str, entry: Experts, masks: Masks, layer: int) -> None:
    """Cut a layer's stacks and its router: whole experts, neurons of each, width.

    Args:
        state: the layer's tensors by the stock model's names; they are replaced.
        prefix: what their names begin with.
        entry: what the family's entry says of its experts.
        masks: the units to keep, with as many neurons for all experts of the layer.
        layer: the layer's index.
    """
    whole, experts = masks.layout.shape.layers[layer], _kept_experts(masks, layer)
    width_D, neurons_EK = kept_units(masks.hidden), _kept_neurons(masks, layer)
    row_dim = 2 if entry.transposed else 1
    for projection in entry.projections:
        rows: Tensor | None = width_D
        columns: Tensor | None = neurons_EK
        if projection.columns == "hidden":
            # Where gate and up are in one stack, a neuron has a row of each.
            count, width = len(projection.rows), whole.expert_neurons
            if entry.interleaved:
                places = neurons_EK.unsqueeze(-1) * count + torch.arange(count)
            else:
                places = neurons_EK.unsqueeze(1) + width * torch.arange(count).unsqueeze(-1)
            rows, columns = places.flatten(1), width_D
        name = f"{prefix}{projection.path}"
        _select(state, name, experts, 0)
        _select(state, name, rows, row_dim)
        _select(state, name, columns, 3 - row_dim)
        _select(state, f"{name}_bias", experts, 0)
        _select(state, f"{name}_bias", rows, 1)
    _select(state, f"{prefix}{entry.shared_gate}.weight", width_D, 1)
    for name in [x for x in state if x.startswith(f"{prefix}{entry.router}.")]:
        if len(state[name]) == whole.experts:
            _select(state, name, experts, 0)
            if state[name].dim() == 2:
                _select(state, name, width_D, 1)


def _cut_outside(anatomy: Anatomy, masks: Masks) -> Tensors:
    family, width_D = anatomy.family, kept_units(masks.hidden)
    whole = anatomy.model.state_dict()
    state = {name: x for name, x in whole.items() if not name.startswith(f"{family.layers}.")}
    head = f"{anatomy.head_path}.weight"
    if anatomy.tied:
        state.pop(head, None)
    _select(state, f"{family.embedding}.weight", width_D, 1)
    _select(state, f"{family.final_norm}.weight", width_D, 0)
    _select(state, head, width_D, 1)
    return state


def _gone(anatomy: Anatomy, name: str, kept: LayerShape) -> bool:
    """Return whether a layer's tensor belongs to a block that was removed."""
    family, paths = anatomy.family, list[str]()
    if not kept.mixes:
        paths += [*family.attention_modules, *family.attention_norms]
    if not kept.mlp:
        paths += [*family.mlp_modules, *family.mlp_norms]
    return any(name.startswith(f"{path}.") for path in paths)


def _select(state: Tensors, name: str, index: Tensor | None, dim: int) -> None:
    """Keep a tensor's entries along a dimension, by an index (K,), or (E, K) for each expert."""
    if index is None or name not in state:
        return
    tensor, index = state[name], index.to(state[name].device)
    if index.dim() == 1:
        state[name] = tensor.index_select(dim, index)
    else:
        shape = [1] * tensor.dim()
        shape[0], shape[dim] = index.shape
        state[name] = torch.take_along_dim(tensor, index.view(shape), dim)


def narrower_epsilon(anatomy: Anatomy, masks: Masks) -> float | None:
    """Return the norms' epsilon of the smaller model where it changes, None where it does not.

    With d - k dimensions always zero, x / sqrt(mean_d(x^2) + eps) equals
    sqrt(d/k) x / sqrt(mean_k(x^2) + eps d/k): weights are scaled by the first root. Mixers have
    norms inside that share the epsilon and cannot be made up for. There x, the residual stream, is
    divided by the root, and the epsilon stays.
    """
    whole, width = masks.layout.shape.hidden, shape_of(masks).hidden
    if width == whole or anatomy.family.mixer:
        return None
    epsilon = getattr(anatomy.config, anatomy.family.config_names["epsilon"])
    return float(epsilon) * whole / width


def _rescale_layer(anatomy: Anatomy, layer: int, ratio: float) -> None:
    """Rescale a layer's norms to the narrower width."""
    for norm in anatomy.norms(layer):
        scale_norm(anatomy, norm, ratio)
    if anatomy.family.mixer:
        _narrow_stream(anatomy, layer, ratio)
    elif anatomy.qk_norms(layer):
        _rescale_queries_and_keys(anatomy, layer, ratio)


def _rescale_outside(anatomy: Anatomy, ratio: float) -> None:
    """Rescale the final norm and the embedding to a narrower width."""
    scale_norm(anatomy, anatomy.final_norm, ratio)
    in_embedding = 1 / ratio if anatomy.family.mixer else ratio
    if anatomy.family.scaled_embedding or anatomy.family.mixer:
        scale(anatomy.embedding.weight, in_embedding)
        if anatomy.tied:
            scale_norm(anatomy, anatomy.final_norm, 1 / in_embedding)


def _narrow_stream(anatomy: Anatomy, layer: int, ratio: float) -> None:
    """Divide what a layer writes to the residual stream."""
    family = anatomy.family
    parts: list[Tensor | None] = []
    for projection in (family.attention[-1], family.mixer[-1], anatomy.down(layer)):
        if (linear := anatomy.linear(layer, projection)) is not None:
            parts += [linear.weight, linear.bias]
    if (mixture := anatomy.mixture(layer)) is not None:
        parts += [mixture.stack(mixture.down), mixture.bias(mixture.down)]
    for parameter in parts:
        if parameter is not None:
            put(parameter, parameter.float() / ratio)


def _rescale_queries_and_keys(anatomy: Anatomy, layer: int, ratio: float) -> None:
    """Scale queries and keys so that their norms, which share the epsilon, give the same."""
    for projection in anatomy.family.attention:
        linear = anatomy.linear(layer, projection)
        of_values = "v_proj" in projection.path
        if linear is not None and set(projection.rows) <= {"q", "kv"} and not of_values:
            scale(linear.weight, ratio)
            scale(linear.bias, ratio)
