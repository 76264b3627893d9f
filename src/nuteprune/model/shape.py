"""Dimensions of a decoder, layer by layer: plain numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class LayerShape:
    """Counts of one decoder layer; 0 heads means no attention, 0 neurons means no MLP."""

    heads: int
    kv_heads: int
    neurons: int

    @property
    def attention(self) -> bool:
        """Whether the layer still has its attention block."""
        return self.heads > 0

    @property
    def mlp(self) -> bool:
        """Whether the layer still has its MLP block."""
        return self.neurons > 0

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads if self.kv_heads else 0


@dataclass(frozen=True)
class Shape:
    """Residual width and the counts of every layer."""

    hidden: int
    layers: tuple[LayerShape, ...]

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same counts."""
        return len(set(self.layers)) <= 1

    def to_dict(self) -> dict[str, Any]:
        """Return a plain structure for JSON and YAML (the format that `--shape FILE` reads)."""
        return {
            "hidden": self.hidden,
            "layers": [
                {"heads": x.heads, "kv_heads": x.kv_heads, "neurons": x.neurons}
                for x in self.layers
            ],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild a shape from `to_dict`'s structure."""
        return cls(data["hidden"], tuple(LayerShape(**layer) for layer in data["layers"]))


def axis_sizes(layer: LayerShape, head_dim: int) -> dict[str, int]:
    """Return the features of each axis of a layer (`families` names them), `hidden` excepted."""
    return {
        "q": layer.heads * head_dim,
        "kv": layer.kv_heads * head_dim,
        "qkv": 3 * layer.heads * head_dim,
        "neurons": layer.neurons,
    }
