"""The record of gates at one moment: plain tensors, one flat vector per kind.

Shape suffixes: B batch, L layers, H query heads of a layer, F neurons of a layer, D hidden width,
N all units of one kind in the model (layer after layer).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nuteprune.model.family import Projection
from nuteprune.model.hooks import Selection
from nuteprune.model.shape import Shape


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
        self._parts = {
            kind: value.split(layout.sizes[kind], dim=-1) for kind, value in self.values.items()
        }

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

    def attention_input(self, layer: int) -> Tensor | None:
        """Return multipliers (..., H x head_dim) of the attention output projection's input."""
        heads = self.heads(layer)
        return None if heads is None else heads.repeat_interleave(self.layout.head_dim, dim=-1)

    def mlp_input(self, layer: int) -> Tensor | None:
        """Return multipliers (..., F) of the down projection's input."""
        return self.part("neurons", layer)

    def inputs(self, layer: int) -> dict[str, Tensor | None]:
        """Return `attn_block` and `mlp_block` -> multipliers of their last projection's input."""
        return {"attn_block": self.attention_input(layer), "mlp_block": self.mlp_input(layer)}

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
