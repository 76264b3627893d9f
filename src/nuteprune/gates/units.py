"""What belongs to a unit: its parameters, its rank among the units of its layer.

Shape suffixes: I inputs of a projection, U units of a layer, N units of one kind in the whole
model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nuteprune.gates.budget import Budget
from nuteprune.gates.masks import Layout
from nuteprune.gates.probe import Probe, Scores
from nuteprune.model.family import BLOCK_KINDS
from nuteprune.model.shape import LayerShape


def unit_parameters(budget: Budget, kind: str) -> Tensor:
    """Return how many parameters (N,) go when each unit of a kind is cut out of the whole model."""
    shape = budget.shape
    if kind == "hidden":
        narrow = type(shape)(shape.hidden - 1, shape.layers)
        return torch.full((shape.hidden,), float(budget.before - budget.parameters(narrow)))
    counts: list[float] = []
    for layer in shape.layers:
        if kind in BLOCK_KINDS:
            block = budget.attention if kind == "attn_block" else budget.mlp
            present = layer.mixes if kind == "attn_block" else layer.mlp
            counts += [_count(block(layer), shape.hidden)] * present
        elif kind == "neurons":
            two, one = (budget.mlp(replace(layer, neurons=n)) for n in (2, 1))
            counts += [_count(two, shape.hidden) - _count(one, shape.hidden)] * layer.neurons
        elif kind == "experts":
            counts += [_count(budget.expert(layer), shape.hidden)] * layer.experts
        elif kind == "expert_neurons":
            two, one = (budget.expert(replace(layer, expert_neurons=n)) for n in (2, 1))
            each = _count(two, shape.hidden) - _count(one, shape.hidden)
            counts += [each] * (layer.experts * layer.expert_neurons)
        elif layer.attention:
            inner = layer.heads_per_group
            # A second head: of a group of its own, or beside the first.
            group = LayerShape(inner, 1, 0) if kind == "kv_groups" else LayerShape(1, 1, 0)
            alone = kind == "heads" and inner > 1
            pair = LayerShape(2 * group.heads, 1 if alone else 2, 0)
            size = _count(budget.attention(pair), shape.hidden)
            size -= _count(budget.attention(group), shape.hidden)
            counts += [size] * (layer.kv_heads if kind == "kv_groups" else layer.heads)
    return torch.tensor(counts)


def _count(form: tuple[int, int], hidden: int) -> float:
    coefficient, constant = form
    return float(coefficient * hidden + constant)


def over_columns(
    layout: Layout, kind: str, columns: Mapping[str, list[Tensor]], mean: bool = False
) -> Tensor:
    """Return the sums (N,) over the columns of the output or down projection that a unit feeds.

    Args:
        layout: the model's units.
        kind: `heads`, `kv_groups` or `neurons`.
        columns: `heads` and `neurons` -> a value (I,) for each input of every layer's projection.
        mean: take means in place of sums.
    """
    parts = []
    there = [count for count in layout.sizes[kind] if count]  # a block may be gone already
    values = columns["neurons" if kind == "neurons" else "heads"]
    for values_I, count in zip(values, there, strict=True):
        rows = values_I.view(count, -1)
        parts.append(rows.mean(1) if mean else rows.sum(1))
    return torch.cat(parts)


def ranks(layout: Layout, kind: str, scores: Tensor, by_layer: bool = True) -> Tensor:
    """Return the rank (N,) of each unit within its layer, in (0, 1), the best highest.

    A block's place is among the blocks of its kind in the model, and so is that of any unit without
    `by_layer`.
    """
    whole = kind in BLOCK_KINDS or not by_layer
    sizes = [len(scores)] if whole else list(layout.sizes[kind])
    parts = []
    for part in scores.split(sizes):
        place = part.argsort(stable=True).argsort(stable=True)
        parts.append((place.float() + 0.5) / max(1, len(part)))
    return torch.cat(parts)


def ranked(probe: Probe, scores: Mapping[str, Tensor], by_layer: bool = True) -> Scores:
    """Return losses by which the allocator follows a ranking: see `ranks` and `losses_of`."""
    placed = {kind: ranks(probe.layout, kind, value, by_layer) for kind, value in scores.items()}
    return losses_of(probe.budget, placed)


def in_order(sizes: Sequence[int], losses: Tensor, places: Tensor) -> Tensor:
    """Return each layer's losses given to its units anew: the least to the one of least place.

    Args:
        sizes: units of each layer.
        losses: of removing each unit (N,).
        places: that units go by (N,).
    """
    parts = []
    for loss_U, place_U in zip(losses.split(sizes), places.split(sizes), strict=True):
        order_U = place_U.argsort(stable=True)
        parts.append(torch.empty_like(loss_U).index_copy(0, order_U, loss_U.sort().values))
    return torch.cat(parts)


def chance(budget: Budget, layout: Layout, kinds: Iterable[str], seed: int) -> dict[str, Tensor]:
    """Return u x parameters of each unit, u uniform in (0, 1): each part loses about its share."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {kind: torch.rand(layout.units(kind), generator=generator) for kind in kinds}
    return losses_of(budget, drawn)


def losses_of(budget: Budget, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return losses from scores: with them the allocator removes the lowest scores first.

    The allocator removes what costs least per parameter. A score that is compared as it is, even
    between a neuron and a head, therefore becomes (score - lowest) x parameters.

    Args:
        budget: counts the parameters of each unit.
        scores: kind -> (N,), comparable across layers and kinds.
    """
    lowest = min(float(value.min()) for value in scores.values())
    return {
        kind: (value - lowest) * unit_parameters(budget, kind).to(value)
        for kind, value in scores.items()
    }
