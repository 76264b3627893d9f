"""Masks -> parameters -> sparsity, in closed form.

What counts are the weights and biases of the decoder layers' projections (the paper's
convention); embeddings, head and norms do not. Every projection reads or writes the residual
stream, so a model's count is hidden x coefficient + constant: the form that `allocate` solves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import Family, Projection
from nuteprune.model.shape import LayerShape, Shape


class Budget:
    """Counts the parameters of a model cut to some shape.

    Args:
        family: what the model is made of.
        shape: the model's dimensions before pruning.
        head_dim: features per head.
        biases: projection path -> whether it has a bias.
    """

    def __init__(
        self, family: Family, shape: Shape, head_dim: int, biases: Mapping[str, bool]
    ) -> None:
        self.family = family
        self.shape = shape
        self.head_dim = head_dim
        self.biases = dict(biases)
        self.before = self.parameters(shape)

    @classmethod
    def of(cls, anatomy: Anatomy) -> Budget:
        """Return the budget of a live model."""
        return cls(anatomy.family, anatomy.shape, anatomy.head_dim, anatomy.biases)

    def attention(self, layer: LayerShape) -> tuple[int, int]:
        """Return (coefficient of hidden, constant) of an attention block's parameters."""
        if not layer.attention:
            return 0, 0
        return self._linear_form(self.family.attention, layer)

    def mlp(self, layer: LayerShape) -> tuple[int, int]:
        """Return (coefficient of hidden, constant) of an MLP block's parameters."""
        return self._linear_form(self.family.mlp, layer) if layer.mlp else (0, 0)

    def _linear_form(
        self, projections: tuple[Projection, ...], layer: LayerShape
    ) -> tuple[int, int]:
        sizes = self._sizes(layer.heads, layer.kv_heads, layer.neurons)
        coefficient = constant = 0
        for projection in projections:
            bias = self.biases[projection.path]
            if projection.columns == "hidden":
                rows = sum(sizes[axis] for axis in projection.rows)
                coefficient += rows
                constant += rows * bias
            else:
                coefficient += sizes[projection.columns] + bias
        return coefficient, constant

    def _sizes(self, heads: Any, kv_heads: Any, neurons: Any) -> dict[str, Any]:
        return {
            "q": heads * self.head_dim,
            "kv": kv_heads * self.head_dim,
            "qkv": heads * (3 * self.head_dim),
            "neurons": neurons,
        }

    def parameters(self, shape: Shape) -> int:
        """Return the exact number of projection parameters of a model of that shape."""
        total = 0
        for layer in shape.layers:
            for coefficient, constant in (self.attention(layer), self.mlp(layer)):
                total += coefficient * shape.hidden + constant
        return total

    def sparsity(self, shape: Shape) -> float:
        """Return the share of projection parameters that cutting to a shape removes."""
        return 1 - self.parameters(shape) / self.before

    def expected_sparsity(self, keep: Masks) -> Tensor:
        """Return the expected sparsity, differentiable in the units' keep probabilities.

        Args:
            keep: probabilities (N,) that units are kept, per kind; independent of each other.

        Returns:
            A scalar in fp32 on the device of `keep`.
        """
        device = next(iter(keep.values.values())).device
        layers = len(self.shape.layers)
        index = {k: keep.layout.layer_index(k).to(device) for k in keep.values if k != "hidden"}

        def count(kind: str) -> Tensor:
            if kind in keep.values:
                zero = torch.zeros(layers, device=device)
                return zero.index_add(0, index[kind], keep.values[kind].float())
            return torch.tensor(keep.layout.sizes[kind], device=device, dtype=torch.float32)

        heads_L = (
            torch.stack([keep.heads(i).sum() for i in range(layers)])  # type: ignore[union-attr]
            if "kv_groups" in keep.values
            else count("heads")
        )
        kv_L = heads_L if "qkv" in self.family.attention[0].rows else count("kv_groups")
        if "heads" in keep.values and "kv_groups" not in keep.values and self._multi_head:
            kv_L = heads_L
        hidden = keep.values["hidden"].sum() if "hidden" in keep.values else self.shape.hidden
        total = torch.zeros((), device=device)
        sizes = self._sizes(heads_L, kv_L, count("neurons"))
        for block, projections in (
            ("attn_block", self.family.attention),
            ("mlp_block", self.family.mlp),
        ):
            for p in projections:
                inner = sizes[p.columns] if p.columns != "hidden" else sum(sizes[r] for r in p.rows)
                rows = inner if p.columns == "hidden" else hidden
                total = total + (count(block) * (inner * hidden + rows * self.biases[p.path])).sum()
        return 1 - total / self.before

    @property
    def _multi_head(self) -> bool:
        return all(x.heads == x.kv_heads for x in self.shape.layers)
