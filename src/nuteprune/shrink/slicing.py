"""Cut pruned rows and columns out of a finalized model: smaller tensors, the same function.

Shape suffixes: O rows, I columns, D hidden width.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from nuteprune.gates.features import features, kept_rows, kept_units, live_groups
from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Projection
from nuteprune.model.shape import LayerShape, Shape, axis_sizes
from nuteprune.shrink.finalize import scale_norm


def shape_of(masks: Masks) -> Shape:
    """Return the dimensions that are left by what masks keep (non-zero entries)."""
    layers = []
    for i, old in enumerate(masks.layout.shape.layers):
        heads, neurons = masks.heads(i), masks.mlp_input(i)
        kept = old.heads if heads is None else int((heads > 0).sum())
        kv_heads = old.kv_heads if heads is None else int(live_groups(heads, old).sum())
        kept_neurons = old.neurons if neurons is None else int((neurons > 0).sum())
        if not _open(masks.part("attn_block", i)):
            kept = kv_heads = 0
        if not _open(masks.part("mlp_block", i)):
            kept_neurons = 0
        layers.append(LayerShape(kept, kv_heads, kept_neurons))
    hidden = masks.hidden
    width = masks.layout.shape.hidden if hidden is None else int((hidden > 0).sum())
    return Shape(width, tuple(layers))


def _open(gate: Tensor | None) -> bool:
    return gate is None or bool((gate > 0).all())


@torch.no_grad()
def slice_state(anatomy: Anatomy, masks: Masks) -> tuple[dict[str, Tensor], Shape, float | None]:
    """Return the weights of the smaller model.

    Args:
        anatomy: a finalized model: masks folded in, no adapters. Its norms and, where queries and
            keys are normed, its q and k projections are rescaled in place when the width is cut.
        masks: what is kept (non-zero entries), in an exportable shape.

    Returns:
        The state dict by the stock model's names, the shape, and the norms' epsilon where the
        width was cut (None where it was not).
    """
    shape = shape_of(masks)
    epsilon = _rescale_for_width(anatomy, shape.hidden)
    family, width_D = anatomy.family, kept_units(masks.hidden)
    state = dict(anatomy.model.state_dict())
    if anatomy.tied:
        state.pop("lm_head.weight", None)
    for i, kept in enumerate(shape.layers):
        prefix = f"{family.layers}.{i}."
        for name in [n for n in state if n.startswith(prefix)]:
            if _gone(anatomy, name.removeprefix(prefix), kept):
                del state[name]
        old = masks.layout.shape.layers[i]
        sizes = axis_sizes(old, anatomy.head_dim)
        index = features(masks.heads(i), masks.mlp_input(i), old, anatomy.head_dim)
        index["hidden"] = width_D
        for projection in family.projections:
            _cut(state, prefix, projection, index, sizes)
        for path in family.norms:
            _select(state, f"{prefix}{path}.weight", width_D, 0)
    _select(state, f"{family.embedding}.weight", width_D, 1)
    _select(state, f"{family.final_norm}.weight", width_D, 0)
    if not anatomy.tied:
        _select(state, "lm_head.weight", width_D, 1)
    return state, shape, epsilon


def _gone(anatomy: Anatomy, name: str, kept: LayerShape) -> bool:
    """Return whether a layer's tensor belongs to a block that was removed."""
    family = anatomy.family
    parts = {
        True: ((family.attention_module, *family.attention_norms), kept.attention),
        False: ((*family.mlp_modules, *family.mlp_norms), kept.mlp),
    }
    return any(
        not stays and any(name.startswith(f"{path}.") for path in paths)
        for paths, stays in parts.values()
    )


def _cut(
    state: dict[str, Tensor],
    prefix: str,
    projection: Projection,
    index: dict[str, Tensor | None],
    sizes: dict[str, int],
) -> None:
    weight = f"{prefix}{projection.path}.weight"
    if weight not in state:
        return
    rows = kept_rows(projection, index, sizes)
    _select(state, weight, rows, 0)
    _select(state, weight, index[projection.columns], 1)
    _select(state, f"{prefix}{projection.path}.bias", rows, 0)


def _select(state: dict[str, Tensor], name: str, index: Tensor | None, dim: int) -> None:
    if index is not None and name in state:
        state[name] = state[name].index_select(dim, index.to(state[name].device))


def _rescale_for_width(anatomy: Anatomy, width: int) -> float | None:
    """Make the full-size model's norms those of a narrower one; return the new epsilon.

    With d - k dimensions always zero, x / sqrt(mean_d(x^2) + eps) equals
    sqrt(d/k) x / sqrt(mean_k(x^2) + eps d/k).
    """
    whole = anatomy.shape.hidden
    if width == whole:
        return None
    family, ratio = anatomy.family, math.sqrt(whole / width)
    for i in range(len(anatomy.layers)):
        for norm in anatomy.norms(i):
            scale_norm(anatomy, norm, ratio)
        if family.qk_norms:
            _rescale_queries_and_keys(anatomy, i, ratio)
    scale_norm(anatomy, anatomy.final_norm, ratio)
    if family.scaled_embedding:
        tied = anatomy.tied
        embedding = cast(Tensor, anatomy.embedding.weight)
        embedding.copy_((embedding.float() * ratio).to(embedding.dtype))
        if tied:
            scale_norm(anatomy, anatomy.final_norm, 1 / ratio)
    epsilon = getattr(anatomy.config, family.config_names["epsilon"])
    return float(epsilon) * whole / width


def _rescale_queries_and_keys(anatomy: Anatomy, layer: int, ratio: float) -> None:
    """Scale q and k so that their norms, which share the epsilon, put out what they did."""
    for projection in anatomy.family.attention:
        linear = anatomy.linear(layer, projection)
        if linear is not None and set(projection.rows) <= {"q", "kv"}:
            if "v_proj" in projection.path:
                continue
            for parameter in (linear.weight, linear.bias):
                if parameter is not None:
                    parameter.copy_((parameter.float() * ratio).to(parameter.dtype))
