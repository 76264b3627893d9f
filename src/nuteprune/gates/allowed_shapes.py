"""The sizes that a block may have, and the least loss for each amount that all blocks give up.

A block has few options, and layers are independent, so dynamic programming is exact.

Shape suffixes: G KV heads, R query heads of each, E experts, F neurons of each, S steps given up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nuteprune.gates.costs import Priced
from nuteprune.model.shape import LayerShape, Shape

Array = NDArray[np.float64]
NOTHING = LayerShape(0, 0, 0)
"""What is left of a layer whose blocks are gone."""
FINEST = 20_000
"""How many steps a price is divided into, over all layers, at most."""


@dataclass(frozen=True)
class Option:
    """One way to keep part of a block: steps given up, loss, price of what stays, its counts."""

    steps: int
    loss: float
    coefficient: float
    constant: float
    kept: LayerShape

    def price(self, width: int) -> float:
        """Return the price at a width."""
        return self.coefficient * width + self.constant


@dataclass(frozen=True)
class Constraints:
    """Which shapes may come out.

    Args:
        kinds: the kinds of gates in use; everything else stays whole.
        uniform: the same counts in every layer.
        neuron_multiple: neurons kept per layer are a multiple of it (or all of them).
        hidden_multiple: the width kept is a multiple of it (or all of it).
        floor: dimensions that the user chose to keep at least; None: none were chosen.
        unstated: widths that the model's config cannot state.
        others: kinds of gates that could be added to those in use.
    """

    kinds: tuple[str, ...]
    uniform: bool = False
    neuron_multiple: int = 1
    hidden_multiple: int = 1
    floor: Shape | None = None
    unstated: frozenset[int] = frozenset()
    others: tuple[str, ...] = ()


class Options:
    """The ways to keep part of each block of a model.

    Args:
        cost: prices what stays.
        constraints: which shapes may come out.
        parts: the loss of each unit, kind -> (n,) for each layer.
    """

    def __init__(
        self, cost: Priced, constraints: Constraints, parts: Mapping[str, list[Array]]
    ) -> None:
        self.cost, self.constraints, self.parts = cost, constraints, parts
        self._shape = cost.budget.shape
        self._floor = constraints.floor or Shape(0, (NOTHING,) * len(self._shape.layers))
        # So that as many steps are as many neurons, whichever layers they come from.
        counts = (layer.neurons for layer in self._shape.layers)
        self._neurons_per_step = math.gcd(constraints.neuron_multiple, *counts)

    def widths(self) -> list[tuple[int, float]]:
        """Return (width, loss) of all widths that may be kept, the whole one first."""
        width, multiple = self._shape.hidden, self.constraints.hidden_multiple
        if "hidden" not in self.parts:
            return [(width, 0.0)]
        gone = _least_sums(self.parts["hidden"][0])
        kept = _counts(width, multiple, self._floor.hidden)
        return [(k, float(gone[width - k])) for k in kept if k not in self.constraints.unstated]

    def attention(self, layer: int) -> list[Option]:
        """Return the options of a layer's attention, the whole one first."""
        whole, parts = self._shape.layers[layer], self.parts
        if not whole.attention:
            return self._mixer(layer)
        groups, inner = whole.kv_heads, whole.heads_per_group
        group_G = self._losses("kv_groups", layer, groups)
        head_GR = self._losses("heads", layer, groups, inner)
        cuts_groups = "kv_groups" in parts or ("heads" in parts and inner == 1)
        cuts_heads = "heads" in parts and inner > 1
        all_steps = groups * (inner + 1)
        options = []
        for r in range(inner, 0, -1) if cuts_heads else [inner]:
            inside_G = np.sort(head_GR, axis=1)[:, : inner - r].sum(axis=1)
            whole_G = group_G if "kv_groups" in parts else head_GR.sum(axis=1)
            extra = _least_sums(whole_G - inside_G)
            for g in range(groups, 0, -1) if cuts_groups else [groups]:
                kept = LayerShape(g * r, g, 0, mixer=whole.mixer)
                options.append(
                    Option(
                        all_steps - g * (r + 1),
                        float(inside_G.sum() + extra[groups - g]),
                        *self.cost.attention(layer, kept),
                        kept,
                    )
                )
        if "attn_block" in parts and layer != self._shape.first_attention:
            loss = float(parts["attn_block"][layer][0])
            options.append(Option(all_steps, loss, 0, 0, NOTHING))
        least = self._floor.layers[layer]
        pairs = ((x, x.kept) for x in options)
        return [x for x, k in pairs if k.heads >= least.heads and k.kv_heads >= least.kv_heads]

    def _mixer(self, layer: int) -> list[Option]:
        """Return the options of a layer without heads: its mixer stays as a whole or goes."""
        whole, parts = self._shape.layers[layer], self.parts
        kept = LayerShape(0, 0, 0, mixer=whole.mixer)
        options = [Option(0, 0.0, *self.cost.attention(layer, kept), kept)]
        if whole.mixer and "attn_block" in parts and not self._floor.layers[layer].mixer:
            options.append(Option(1, float(parts["attn_block"][layer][0]), 0, 0, NOTHING))
        return options

    def mlp(self, layer: int) -> list[Option]:
        """Return the options of a layer's MLP, the whole one first."""
        whole, parts = self._shape.layers[layer], self.parts
        total = whole.neurons
        if not whole.mlp:
            return [Option(0, 0.0, 0, 0, NOTHING)]
        options = []
        for n, loss in self._neurons(layer):
            steps = -(-(total - n) // self._neurons_per_step)
            for e, f, more in self._experts(layer):
                kept = LayerShape(0, 0, n, e, f)
                options.append(Option(steps, loss + more, *self.cost.mlp(layer, kept), kept))
        if "mlp_block" in parts and not self._floor.layers[layer].mlp:
            steps = total // self._neurons_per_step
            options.append(Option(steps, float(parts["mlp_block"][layer][0]), 0, 0, NOTHING))
        return options

    def _neurons(self, layer: int) -> list[tuple[int, float]]:
        """Return (neurons, loss) of what may be kept of those outside of experts."""
        total = self._shape.layers[layer].neurons
        if "neurons" not in self.parts or not total:
            return [(total, 0.0)]
        gone = _least_sums(self.parts["neurons"][layer])
        floor = self._floor.layers[layer].neurons
        kept = _counts(total, self.constraints.neuron_multiple, floor)
        return [(n, float(gone[total - n])) for n in kept]

    def _experts(self, layer: int) -> list[tuple[int, int, float]]:
        """Return (experts, neurons of each, loss) of what may be kept of routed experts."""
        whole, parts, floor = self._shape.layers[layer], self.parts, self._floor.layers[layer]
        count, width = whole.experts, whole.expert_neurons
        if not count:
            return [(0, 0, 0.0)]
        fewest = max(self.cost.budget.per_token, floor.experts) if "experts" in parts else count
        whole_E = self._losses("experts", layer, count)
        inner_EF = np.sort(self._losses("expert_neurons", layer, count, width), axis=1)
        widths = [width]
        if "expert_neurons" in parts:
            widths = _counts(width, self.constraints.neuron_multiple, floor.expert_neurons)
        found = []
        for f in widths:
            inside_E = inner_EF[:, : width - f].sum(axis=1)
            extra = _least_sums(whole_E - inside_E)
            found += [
                (e, f, float(inside_E.sum() + extra[count - e]))
                for e in range(count, min(count, fewest) - 1, -1)
            ]
        return found

    def _losses(self, kind: str, layer: int, *shape: int) -> Array:
        """Return the losses of a layer's units of a kind, 0 where it has no gates."""
        return self.parts[kind][layer].reshape(shape) if kind in self.parts else np.zeros(shape)


def _least_sums(losses: Array) -> Array:
    """Return the sums of the least 0, 1, 2 ... losses."""
    return np.concatenate([[0.0], np.cumsum(np.sort(losses))])


def _counts(total: int, multiple: int, floor: int) -> list[int]:
    """Return what may be kept of `total`: all, the multiples, and the floor where there is one."""
    multiples = range((total - 1) // multiple * multiple, floor, -multiple)
    return [total, *multiples, *([floor] if 0 < floor < total else [])]


# -- all blocks together


@dataclass(frozen=True)
class Frontier:
    """Least loss for each number of steps S given up over all layers (inf: cannot be)."""

    loss_S: Array
    price_2S: Array
    """Coefficient and constant of the price of what stays."""
    picks: list[NDArray[np.int64]]
    options: Sequence[Sequence[Option]]

    def counts(self, steps: int) -> list[LayerShape]:
        """Return the counts that each layer keeps when `steps` are given up."""
        kept: list[LayerShape] = []
        for options, pick in zip(reversed(self.options), reversed(self.picks), strict=True):
            option = options[pick[steps]]
            kept.append(option.kept)
            steps -= option.steps
        return kept[::-1]

    def after(self, width: int) -> Array:
        """Return the price (S,) of what stays at a width, inf where nothing has so many steps."""
        coefficient_S, constant_S = self.price_2S
        return np.where(np.isfinite(self.loss_S), coefficient_S * width + constant_S, np.inf)


def frontier(layers: Sequence[Sequence[Option]]) -> Frontier:
    """Combine the options of independent layers: exact dynamic programming over steps."""
    loss_S, price_2S = np.zeros(1), np.zeros((2, 1))
    picks = []
    for options in layers:
        size = len(loss_S) + max(o.steps for o in options)
        best_S, pick_S = np.full(size, np.inf), np.zeros(size, dtype=np.int64)
        grown_2S = np.zeros((2, size))
        for i, option in enumerate(options):
            window = slice(option.steps, option.steps + len(loss_S))
            better = loss_S + option.loss < best_S[window]
            best_S[window][better] = (loss_S + option.loss)[better]
            pick_S[window][better] = i
            line_21 = np.array([[option.coefficient], [option.constant]])
            grown_2S[:, window][:, better] = (price_2S + line_21)[:, better]
        loss_S, price_2S = best_S, grown_2S
        picks.append(pick_S)
    return Frontier(loss_S, price_2S, picks, layers)


def steps_by_price(layers: Sequence[Sequence[Option]], width: int) -> list[list[Option]]:
    """Return the options of layers, with steps that measure the fall of their price at a width.

    The steps are exact where prices are whole numbers with a divisor that is large enough, else
    rounded down: what an option costs is counted exactly all the same.

    Args:
        layers: the options of each layer, the whole one first.
        width: the hidden width.
    """
    gone = [[max(0.0, own[0].price(width) - o.price(width)) for o in own] for own in layers]
    amounts = [float(x) for own in gone for x in own]
    most = sum(map(max, gone))
    step = 0.0
    if all(x.is_integer() for x in amounts):
        step = math.gcd(*map(int, amounts))
    if most > FINEST * step:
        step = most / FINEST
    return [
        [replace(o, steps=int(x // (step or 1))) for o, x in zip(own, xs, strict=True)]
        for own, xs in zip(layers, gone, strict=True)
    ]


def are_proportional(layers: Sequence[Sequence[Option]]) -> bool:
    """Return whether a step frees as much at any width, for all options."""
    freed = [
        (o.steps, own[0].coefficient - o.coefficient, own[0].constant - o.constant)
        for own in layers
        for o in own[1:]
    ]
    return all(
        steps * first[1] == first[0] * coefficient and steps * first[2] == first[0] * constant
        for first in freed[:1]
        for steps, coefficient, constant in freed
    )


def shared_options(layers: Sequence[Sequence[Option]]) -> list[Option]:
    """Return the options that all layers have, summed up (uniform shapes)."""
    tables = [{o.kept: o for o in options} for options in layers]
    common = [kept for kept in tables[0] if all(kept in table for table in tables)]
    rows = [[table[kept] for table in tables] for kept in common]
    return [
        Option(
            row[0].steps,
            sum(o.loss for o in row),
            sum(o.coefficient for o in row),
            sum(o.constant for o in row),
            row[0].kept,
        )
        for row in rows
    ]


def cheapest_steps(
    loss_S: Array, first: NDArray[np.int64], after_S: Array, floor: Array
) -> NDArray[np.int64]:
    """Return the steps of least loss, from `first` on, that leave no less than `floor`.

    More steps can cost less where a whole block is cheaper than most of its neurons.
    """
    last = np.maximum(first, np.searchsorted(-after_S, -floor, side="right") - 1)
    best = first.copy()
    for more in range(1, int((last - first).max()) + 1):
        steps = np.minimum(first + more, last)
        better = loss_S[steps] < loss_S[best]
        best[better] = steps[better]
    return best
