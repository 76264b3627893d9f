"""The least loss for each amount that all blocks together give up.

A block has few options, and layers are independent, so dynamic programming is exact.

Shape suffix: S steps given up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nuteprune.model.shape import LayerShape

Array = NDArray[np.float64]


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


FINEST = 20_000
"""How many steps a price is divided into, over all layers, at most."""


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
