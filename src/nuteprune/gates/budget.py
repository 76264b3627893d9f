"""From masks to parameters to sparsity, in closed form.

What counts are the weights and biases of the decoder layers' projections (the paper's
convention); embeddings, head and norms do not. Every projection reads or writes the residual
stream, or is of a fixed size, so a model's count is hidden x coefficient + constant: the form that
`allocate` solves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import BLOCK_KINDS, Family, Projection
from nuteprune.model.shape import PER_HEAD, LayerShape, Shape, axis_sizes


@dataclass(frozen=True, eq=False)
class Budget:
    """Counts the parameters of a model cut to some shape.

    Args:
        family: what the model is made of.
        shape: the model's dimensions before pruning.
        head_dim: features per head.
        biases: projection path -> whether it has a bias.
        per_token: how many routed experts a token goes through, 0 without any.
        inner: `Anatomy.inner_sizes`, of what no gate cuts.
    """

    family: Family
    shape: Shape
    head_dim: int
    biases: Mapping[str, bool]
    per_token: int = 0
    inner: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def layout(self) -> Layout:
        """The model's units."""
        return Layout(self.shape, self.head_dim)

    @cached_property
    def before(self) -> int:
        """The parameters before pruning."""
        return self.parameters(self.shape)

    @classmethod
    def of(cls, anatomy: Anatomy) -> Budget:
        """Return the budget of a live model."""
        return cls(
            anatomy.family,
            anatomy.shape,
            anatomy.head_dim,
            anatomy.biases,
            anatomy.per_token,
            anatomy.inner_sizes,
        )

    def attention(self, layer: LayerShape) -> tuple[int, int]:
        """Return (coefficient of hidden, constant) of an attention block's parameters."""
        return self._linear_form(self._mixing(layer), layer)

    def mlp(self, layer: LayerShape) -> tuple[int, int]:
        """Return (coefficient of hidden, constant) of an MLP block's parameters."""
        coefficient, constant = self._linear_form(self._mlp(layer), layer)
        each = self.expert(layer)
        return coefficient + layer.experts * each[0], constant + layer.experts * each[1]

    def expert(self, layer: LayerShape) -> tuple[int, int]:
        """Return (coefficient of hidden, constant) of one routed expert's parameters."""
        return self._linear_form(self._stacks, layer)

    def _mixing(self, layer: LayerShape) -> tuple[Projection, ...]:
        """Return the projections that a layer mixes tokens by; a mixer goes as a whole."""
        attention = self.family.attention if layer.attention else ()
        return attention + (self.family.mixer if layer.mixer else ())

    def _mlp(self, layer: LayerShape) -> tuple[Projection, ...]:
        return self.family.mlp_of(layer.experts > 0) if layer.neurons else ()

    @property
    def _stacks(self) -> tuple[Projection, ...]:
        return self.family.experts.projections if self.family.experts else ()

    def _linear_form(
        self, projections: tuple[Projection, ...], layer: LayerShape
    ) -> tuple[int, int]:
        sizes = axis_sizes(layer, self.head_dim)
        constant = self._count(projections, sizes, 0)
        return self._count(projections, sizes, 1) - constant, constant

    def _count(
        self,
        projections: tuple[Projection, ...],
        sizes: Mapping[str, Any],
        hidden: Any,
        times: Any = 1,
    ) -> Any:
        """Return the parameters of projections, numbers or expected ones.

        Args:
            projections: of one block.
            sizes: features of each axis that a gate cuts, `hidden` excepted.
            hidden: the width.
            times: how many of each there are, with a bias each; `sizes` are of all together.
        """
        count = 0
        for projection in projections:
            bias = self.biases[projection.path]
            inner = self.inner.get(projection.path, 0)
            if projection.inside:
                count = count + inner
            elif projection.columns == "hidden":
                rows = sum(sizes.get(axis, inner) for axis in projection.rows)
                count = count + rows * (hidden + bias)
            else:
                count = count + hidden * (sizes.get(projection.columns, inner) + times * bias)
        return count

    def of_a_unit(self, layer: LayerShape, kind: str) -> int:
        """Return how many parameters go with each unit of a kind that a layer has."""
        if kind in BLOCK_KINDS:
            return self._of(layer, self.attention if kind == "attn_block" else self.mlp)
        if kind == "experts":
            return self._of(layer, self.expert)
        block = self.attention
        if kind == "neurons":
            block, more = self.mlp, replace(layer, neurons=layer.neurons + 1)
        elif kind == "expert_neurons":
            block, more = self.expert, replace(layer, expert_neurons=layer.expert_neurons + 1)
        else:
            inner = layer.heads_per_group
            heads, groups = (inner, 1) if kind == "kv_groups" else (1, inner == 1)
            more = replace(layer, heads=layer.heads + heads, kv_heads=layer.kv_heads + groups)
        return self._of(more, block) - self._of(layer, block)

    def _of(self, layer: LayerShape, block: Callable[[LayerShape], tuple[int, int]]) -> int:
        coefficient, constant = block(layer)
        return coefficient * self.shape.hidden + constant

    def parameters(self, shape: Shape) -> int:
        """Return the exact number of projection parameters of a model of that shape."""
        total = 0
        for layer in shape.layers:
            for coefficient, constant in (self.attention(layer), self.mlp(layer)):
                total += coefficient * shape.hidden + constant
        return total

    def of_a_token(self, layer: LayerShape) -> LayerShape:
        """Return the part of a layer that one token goes through."""
        return replace(layer, experts=min(layer.experts, self.per_token))

    def idle(self, shape: Shape) -> int:
        """Return how many parameters a token does not go through: those of other experts."""
        layers = tuple(map(self.of_a_token, shape.layers))
        return self.parameters(shape) - self.parameters(Shape(shape.hidden, layers))

    def sparsity(self, shape: Shape) -> float:
        """Return the share of projection parameters that cutting to a shape removes."""
        return share_gone(self.before, self.parameters(shape))

    def expected_sparsity(self, keep: Masks) -> Tensor:
        """Return the expected sparsity, differentiable in the units' keep probabilities.

        Args:
            keep: probabilities (N,) that units are kept, per kind; independent of each other.

        Returns:
            A scalar in fp32 on the device of `keep`.
        """
        device = next(iter(keep.values.values())).device
        hidden = keep.values["hidden"].sum() if "hidden" in keep.values else self.shape.hidden
        total = torch.zeros((), device=device)
        for i, layer in enumerate(self.shape.layers):
            sizes: dict[str, Any] = axis_sizes(layer, self.head_dim)
            heads = keep.heads(i)
            if heads is not None and layer.attention:
                groups = keep.part("kv_groups", i)
                kept = heads.sum() * self.head_dim
                sizes |= {axis: many * kept for axis, many in PER_HEAD.items()}
                if layer.heads_per_group == 1:
                    sizes["kv"] = sizes["q"]
                elif groups is not None:
                    sizes["kv"] = groups.sum() * self.head_dim
            neurons = keep.part("neurons", i)
            if neurons is not None:
                sizes["neurons"] = neurons.sum()
            experts, sizes["expert_neurons"] = _expected_experts(keep, i, layer)
            mlp = self._count(self._mlp(layer), sizes, hidden)
            mlp = mlp + self._count(self._stacks, sizes, hidden, experts)
            attention = self._count(self._mixing(layer), sizes, hidden)
            for block, present, count in (
                ("attn_block", layer.mixes, attention),
                ("mlp_block", layer.mlp, mlp),
            ):
                if present:
                    gate = keep.part(block, i)
                    total = total + (count if gate is None else gate.squeeze(-1) * count)
        return 1 - total / self.before


def unit_parameters(budget: Budget, kind: str) -> Tensor:
    """Return how many parameters (N,) go when each unit of a kind is cut out of the whole model."""
    shape = budget.shape
    if kind == "hidden":
        narrow = Shape(shape.hidden - 1, shape.layers)
        return torch.full((shape.hidden,), float(budget.before - budget.parameters(narrow)))
    counts: list[float] = []
    for layer, units in zip(shape.layers, budget.layout.sizes[kind], strict=True):
        counts += [float(budget.of_a_unit(layer, kind))] * units
    return torch.tensor(counts)


def share_gone(before: float, after: float) -> float:
    """Return the share that is gone; unlike 1 - after / before, 20 % comes out as 0.2."""
    return (before - after) / before


def _expected_experts(keep: Masks, index: int, layer: LayerShape) -> tuple[Any, Any]:
    """Return how many experts of a layer are kept, and how many neurons in all of them."""
    if not layer.experts:
        return 0, 0
    experts, neurons = keep.part("experts", index), keep.part("expert_neurons", index)
    count = layer.experts if experts is None else experts.sum()
    if neurons is None:
        return count, count * layer.expert_neurons
    if experts is not None:
        neurons = neurons.view(layer.experts, -1) * experts.unsqueeze(-1)
    return count, neurons.sum()
