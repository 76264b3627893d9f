"""What masks keep: each layer's remaining features, to compute with or to write.

Shape suffixes: H query heads, G KV heads, F neurons of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nuteprune.gates.masks import Masks
from nuteprune.model.family import Family, Projection
from nuteprune.model.hooks import Selection
from nuteprune.model.shape import PER_HEAD, LayerShape, axis_sizes

UNITED = ("q", "kv", "qkv", "qgate", "mixer", "latent")
"""Axes whose features belong to heads, or stay together."""


def live_groups(heads_H: Tensor, layer: LayerShape) -> Tensor:
    """Return which KV heads of a layer (G,) serve a query head that is kept."""
    return (heads_H.reshape(layer.kv_heads, layer.heads_per_group) > 0).any(1)


def features(
    heads_H: Tensor | None, neurons_F: Tensor | None, layer: LayerShape, head_dim: int
) -> dict[str, Tensor | None]:
    """Return for each axis of a layer (`families` names them) the features of kept units.

    Args:
        heads_H: multipliers of query heads, kept if above 0; None: all are kept.
        neurons_F: multipliers of neurons, likewise.
        layer: its counts.
        head_dim: features of a head.

    Returns:
        Indices on the CPU, None where all features are kept.
    """
    heads = kept_units(heads_H)
    index: dict[str, Tensor | None] = dict.fromkeys(UNITED)
    if heads_H is not None and heads is not None:
        index |= {axis: _spread(heads, many * head_dim) for axis, many in PER_HEAD.items()}
        index["kv"] = _spread(live_groups(heads_H, layer).nonzero().flatten().cpu(), head_dim)
    return {**index, "neurons": kept_units(neurons_F)}


def kept_units(units: Tensor | None) -> Tensor | None:
    """Return the indices of the units that are kept, on the CPU; None if all are."""
    if units is None or bool((units > 0).all()):
        return None
    return (units > 0).nonzero().flatten().cpu()


def _spread(units: Tensor, size: int) -> Tensor:
    """Return the features of units that own `size` consecutive features each."""
    return (units.unsqueeze(-1) * size + torch.arange(size)).flatten()


def kept_rows(
    projection: Projection, index: dict[str, Tensor | None], sizes: dict[str, int]
) -> Tensor | None:
    """Return the rows of a projection that are kept; stacked axes are taken one by one.

    Args:
        projection: says which axes its rows are.
        index: the features of each axis that are kept, None for all.
        sizes: how many features each axis has.
    """
    if all(index[axis] is None for axis in projection.rows):
        return None
    if len(projection.rows) == 1:
        return index[projection.rows[0]]
    start, parts = 0, []
    for axis in projection.rows:
        kept = index[axis]
        parts.append(start + (torch.arange(sizes[axis]) if kept is None else kept))
        start += sizes[axis]
    return torch.cat(parts)


@dataclass(frozen=True)
class _Layer:
    projections: dict[str, Selection]
    attention_input: Tensor | None
    mlp_input: Tensor | None


class NarrowMasks(Masks):
    """Fixed masks, for hooks: neurons and KV groups at 0 are not computed.

    KV groups go whole, so that each KV head keeps its number of query heads. A block with no unit
    left still computes one, to keep its tensors' shapes valid. Everything else at 0 (query heads of
    a group that stays, hidden width) is multiplied by 0.

    Args:
        masks: fixed ones.
        family: the model's.
        multiple: computed neurons are a multiple of it; some neurons at 0 fill it up.
    """

    def __init__(self, masks: Masks, family: Family, multiple: int = 1) -> None:
        super().__init__(masks.layout, masks.values)
        self.masks = masks
        self._multiple = multiple
        self._on_cpu = masks.to("cpu")
        self._device = next((v.device for v in masks.values.values()), torch.device("cpu"))
        self._family = family
        self._layers: dict[int, _Layer] = {}

    def attention_input(self, layer: int) -> Tensor | None:
        """Return multipliers of the inputs that the attention output projection still reads."""
        return self._layer(layer).attention_input

    def mlp_input(self, layer: int) -> Tensor | None:
        """Return multipliers of the inputs that the down projection still reads."""
        return self._layer(layer).mlp_input

    def selection(self, layer: int, projection: Projection) -> Selection:
        """Return which rows and columns of a projection are computed."""
        return self._layer(layer).projections[projection.path]

    def _layer(self, layer: int) -> _Layer:
        if layer not in self._layers:
            self._layers[layer] = self._look_at(layer)
        return self._layers[layer]

    def _look_at(self, layer: int) -> _Layer:
        masks, family, head_dim = self._on_cpu, self._family, self.masks.layout.head_dim
        shape = masks.layout.shape.layers[layer]
        heads, neurons = masks.heads(layer), masks.mlp_input(layer)
        if _gone(masks.part("attn_block", layer)):
            heads = torch.zeros(shape.heads)
        if _gone(masks.part("mlp_block", layer)):
            neurons = torch.zeros(shape.neurons)
        if family.counts_heads:
            heads = None
        if heads is not None:
            groups = _at_least_one(live_groups(heads, shape))
            heads = groups.repeat_interleave(shape.heads_per_group)
        if neurons is not None:
            neurons = _filled_up(_at_least_one(neurons > 0), self._multiple)
        index = features(heads, neurons, shape, head_dim)
        sizes = axis_sizes(shape, head_dim)
        places = {"hidden": None} | {k: self._placed(v) for k, v in index.items()}
        projections = {
            p.path: (
                self._placed(kept_rows(p, {"hidden": None, **index}, sizes)),
                places[p.columns],
            )
            for p in family.projections
        }
        return _Layer(
            projections,
            self._placed(_multipliers(masks.attention_input(layer), index["q"])),
            self._placed(_multipliers(masks.mlp_input(layer), index["neurons"])),
        )

    def _placed(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(self._device)


def _gone(block: Tensor | None) -> bool:
    return block is not None and bool((block == 0).any())


def _at_least_one(kept: Tensor) -> Tensor:
    """Return which units are kept, the first one where none is."""
    kept = kept.clone()
    kept[:1] |= ~kept.any()
    return kept


def _filled_up(kept: Tensor, multiple: int) -> Tensor:
    """Return which units are kept, filled up with others to a multiple, if there are so many."""
    others = (~kept).nonzero().flatten()
    return kept.index_fill(0, others[: -int(kept.sum()) % multiple], True)


def _multipliers(mask: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """Return a mask's entries that are kept, None if they multiply by 1."""
    if mask is not None and kept is not None:
        mask = mask.index_select(0, kept)
    return None if mask is None or bool((mask == 1).all()) else mask
