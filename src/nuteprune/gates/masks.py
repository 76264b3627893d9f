"""The record of gates at one moment, one flat vector per kind, and the features that it keeps.

Shape suffixes: B batch, H query heads of a layer, G KV heads, F neurons of a layer, D hidden width,
N all units of one kind in the model (layer after layer).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nuteprune.model.family import Family, Projection
from nuteprune.model.hooks import Selection
from nuteprune.model.shape import PER_HEAD, LayerShape, Shape, axis_sizes


@dataclass(frozen=True)
class Layout:
    """How many units of each kind every layer of a model has."""

    shape: Shape
    head_dim: int

    @cached_property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Kind -> number of units in each layer (`hidden`: one entry for the whole model)."""
        layers = self.shape.layers
        return {
            "heads": tuple(x.heads for x in layers),
            "kv_groups": tuple(x.kv_heads for x in layers),
            "neurons": tuple(x.neurons for x in layers),
            "experts": tuple(x.experts for x in layers),
            "expert_neurons": tuple(x.experts * x.expert_neurons for x in layers),
            "attn_block": tuple(int(x.mixes) for x in layers),
            "mlp_block": tuple(int(x.mlp) for x in layers),
            "hidden": (self.shape.hidden,),
        }

    def units(self, kind: str) -> int:
        """Return the number of units of a kind in the model."""
        return sum(self.sizes[kind])


class Masks:
    """Multipliers per kind of gate; kinds that are absent are open (1).

    Args:
        layout: the model's units.
        values: kind -> (N,), or (B, N) where each sequence of a batch has masks of its own.
    """

    def __init__(self, layout: Layout, values: Mapping[str, Tensor]) -> None:
        self.layout = layout
        self.values = dict(values)
        self._parts = {k: v.split(layout.sizes[k], dim=-1) for k, v in self.values.items()}

    @classmethod
    def open(cls, layout: Layout, kinds: Iterable[str]) -> Masks:
        """Return masks of ones."""
        return cls(layout, {kind: torch.ones(layout.units(kind)) for kind in kinds})

    def part(self, kind: str, layer: int) -> Tensor | None:
        """Return a layer's multipliers (..., n) of a kind, None if the kind is open."""
        return self._parts[kind][layer] if kind in self._parts else None

    def heads(self, layer: int) -> Tensor | None:
        """Return multipliers (..., H) of a layer's query heads, KV groups spread over theirs."""
        shape = self.layout.shape.layers[layer]
        groups = self.part("kv_groups", layer)
        heads = self.part("heads", layer)
        if groups is None:
            return heads
        spread = groups.repeat_interleave(shape.heads_per_group, dim=-1)
        return spread if heads is None else spread * heads

    def inputs(self, layer: int) -> dict[str, Tensor | None]:
        """Return `attn_block` and `mlp_block` -> multipliers of their last projection's input."""
        heads = self.heads(layer)
        if heads is not None:
            heads = heads.repeat_interleave(self.layout.head_dim, dim=-1)
        return {"attn_block": heads, "mlp_block": self.part("neurons", layer)}

    def selection(self, layer: int, projection: Projection) -> Selection:
        """Return which rows and columns of a projection are computed: all; see `NarrowMasks`."""
        return None, None

    @property
    def hidden(self) -> Tensor | None:
        """Return multipliers (..., D) of the residual stream, None if open."""
        return self.part("hidden", 0)

    @property
    def fixed(self) -> bool:
        """Whether they are the same for all sequences, and no gradients of them are wanted."""
        return all(v.dim() == 1 and not v.requires_grad for v in self.values.values())

    def to(self, device: torch.device | str) -> Masks:
        """Return the masks on a device."""
        return Masks(self.layout, {k: v.to(device) for k, v in self.values.items()})


def live_groups(heads_H: Tensor, layer: LayerShape) -> Tensor:
    """Return which KV heads of a layer (G,) serve a query head that is kept."""
    return (heads_H.reshape(layer.kv_heads, layer.heads_per_group) > 0).any(1)


def kept_features(
    heads_H: Tensor | None, neurons_F: Tensor | None, layer: LayerShape, head_dim: int
) -> dict[str, Tensor]:
    """Return for each axis of a layer (`family` names them) the features of kept units.

    Args:
        heads_H: multipliers of query heads, kept if above 0; None: all are kept.
        neurons_F: multipliers of neurons, likewise.
        layer: its counts.
        head_dim: features of a head.

    Returns:
        Indices on the CPU; axes whose features are all kept are left out.
    """
    found: dict[str, Tensor] = {}
    if heads_H is not None and (heads := kept_units(heads_H)) is not None:
        found |= {axis: _spread(heads, many * head_dim) for axis, many in PER_HEAD.items()}
        found["kv"] = _spread(live_groups(heads_H, layer).nonzero().flatten().cpu(), head_dim)
    if (neurons := kept_units(neurons_F)) is not None:
        found["neurons"] = neurons
    return found


def kept_units(units: Tensor | None) -> Tensor | None:
    """Return the indices of the units that are kept, on the CPU; None if all are."""
    if units is None or bool((units > 0).all()):
        return None
    return (units > 0).nonzero().flatten().cpu()


def _spread(units: Tensor, size: int) -> Tensor:
    """Return the features of units that own `size` consecutive features each."""
    return (units.unsqueeze(-1) * size + torch.arange(size)).flatten()


def kept_parts(
    family: Family, kept: Mapping[str, Tensor], layer: LayerShape, head_dim: int
) -> dict[str, Selection]:
    """Return the rows and columns of each projection that are kept, by its path.

    Args:
        family: the model's.
        kept: the features of each axis that are kept, as `kept_features` has them.
        layer: the layer's counts.
        head_dim: features of a head.
    """
    sizes = axis_sizes(layer, head_dim)

    def rows_of(projection: Projection) -> Tensor | None:
        if len(projection.rows) == 1:
            return kept.get(projection.rows[0])
        if kept.keys().isdisjoint(projection.rows):
            return None
        start, parts = 0, []  # of axes one behind another
        for axis in projection.rows:
            parts.append(start + kept.get(axis, torch.arange(sizes[axis])))
            start += sizes[axis]
        return torch.cat(parts)

    return {p.path: (rows_of(p), kept.get(p.columns)) for p in family.projections}


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
        self.masks, self._family, self._multiple = masks, family, multiple
        self._device = next((v.device for v in masks.values.values()), torch.device("cpu"))
        on_cpu = masks.to("cpu")
        self._layers = [self._look_at(on_cpu, i) for i in range(len(self.layout.shape.layers))]

    def inputs(self, layer: int) -> dict[str, Tensor | None]:
        """Return multipliers of the inputs that the last projections of blocks still read."""
        return self._layers[layer][0]

    def selection(self, layer: int, projection: Projection) -> Selection:
        """Return which rows and columns of a projection are computed."""
        return self._layers[layer][1][projection.path]

    def _look_at(
        self, masks: Masks, layer: int
    ) -> tuple[dict[str, Tensor | None], dict[str, Selection]]:
        """Return what `inputs` and `selection` do of a layer, given the masks on the CPU."""
        shape = self.layout.shape.layers[layer]
        heads, neurons = masks.heads(layer), masks.part("neurons", layer)
        if _gone(masks.part("attn_block", layer)):
            heads = torch.zeros(shape.heads)
        if _gone(masks.part("mlp_block", layer)):
            neurons = torch.zeros(shape.neurons)
        if self._family.counts_heads:
            heads = None
        if heads is not None:
            groups = _at_least_one(live_groups(heads, shape))
            heads = groups.repeat_interleave(shape.heads_per_group)
        if neurons is not None:
            neurons = _filled_up(_at_least_one(neurons > 0), self._multiple)
        head_dim = self.layout.head_dim
        kept = kept_features(heads, neurons, shape, head_dim)
        axes = {"attn_block": "q", "mlp_block": "neurons"}
        inputs = {
            block: self._placed(_multipliers(mask, kept.get(axes[block])))
            for block, mask in masks.inputs(layer).items()
        }
        parts = kept_parts(self._family, kept, shape, head_dim).items()
        return inputs, {
            path: (self._placed(rows), self._placed(columns)) for path, (rows, columns) in parts
        }

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
