"""Which units stay: an exact knapsack from scores to a shape that can be exported.

Every unit has a score, the loss that removing it is expected to cost; scores add up. Units go in
exportable steps (KV groups, query heads alike in all groups of a layer, multiples of neurons and of
the width, whole blocks), alike in all layers where shapes are uniform. Within a layer the lowest
scores go first, so a block has few *options*; the options of all layers combine into a *frontier*
(the least loss for every number of steps), one for attention, one for MLPs; the width is tried at
each multiple. A model's parameters are hidden x coefficient + constant, so that the best
combination is found by enumeration. So is a price in bytes or seconds: `costs` has the prices,
`options` the ways to keep part of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nuteprune.errors import UserError
from nuteprune.gates.allowed_shapes import (
    Constraints,
    Frontier,
    Options,
    are_proportional,
    cheapest_steps,
    frontier,
    shared_options,
    steps_by_price,
)
from nuteprune.gates.budget import Budget
from nuteprune.gates.costs import Cost, Goal, Priced
from nuteprune.gates.masks import Masks
from nuteprune.gates.scores import Scores, chance, layer_masks, top
from nuteprune.model.shape import LayerShape, Shape


class Allocator:
    """Finds a model's exportable shape of least loss at a sparsity, or at another limit.

    Args:
        budget: the model's parameter count.
        constraints: which shapes may come out.

    Raises:
        UserError: if shapes are to be uniform and the model's layers differ already.
    """

    def __init__(self, budget: Budget, constraints: Constraints) -> None:
        self.budget = budget
        self.constraints = constraints
        self.layout = budget.layout
        # The layers whose attention stays alike where shapes are uniform: by heads and mixers. Then
        # the same of MLPs: with experts, and without.
        layers = budget.shape.layers
        self._alike = (
            _grouped([(x.attention, x.mixer) for x in layers]),
            _grouped([x.experts > 0 for x in layers]),
        )
        if constraints.uniform and not budget.shape.uniform:
            raise UserError("uniform shapes need layers alike, and these differ: use --shapes free")

    def shape(self, scores: Scores, asked: float | Goal) -> Shape:
        """Return the shape of least loss within the goal.

        It overshoots by at most one smallest step (or 0.1 point).

        Args:
            scores: loss of removing each unit, for every kind in use.
            asked: share of the projection parameters to remove, in [0, 1), or another goal.

        Raises:
            UserError: if the gates cannot remove that much; names the most that they can.
        """
        goal = asked if isinstance(asked, Goal) else self.goal(asked)
        cost = goal.cost
        best: tuple[float, float] | None = None
        shape = self.budget.shape
        least = np.inf
        frontiers = self._frontiers(scores, cost)
        slack = self._slack(cost, *frontiers[0][2:])
        for width, width_loss, attention, mlp in frontiers:
            limit = goal.limit - cost.rest(width)
            after_a, exact_m = attention.after(width), mlp.after(width)
            after_m = np.minimum.accumulate(exact_m)
            least = min(least, after_a.min() + after_m[-1] + cost.rest(width))
            # The first number of MLP steps that is enough, for each number of attention steps.
            enough = np.searchsorted(-after_m, -(limit - after_a), side="left")
            a = np.flatnonzero(enough < len(after_m))
            if not len(a):
                continue
            loss_m = np.where(exact_m <= after_m, mlp.loss_S, np.inf)
            m = cheapest_steps(loss_m, enough[a], after_m, limit - after_a[a] - slack)
            excess = np.maximum(0.0, limit - after_a[a] - after_m[m] - slack)
            loss = attention.loss_S[a] + mlp.loss_S[m] + width_loss
            i = np.lexsort((loss, excess))[0]
            if best is None or (excess[i], loss[i]) < best:
                best = (float(excess[i]), float(loss[i]))
                shape = self._assemble(width, attention.counts(int(a[i])), mlp.counts(int(m[i])))
        if best is None:
            floor = self.constraints.floor
            if floor is None or cost.total(floor) > goal.limit:
                raise UserError(self._out_of_reach(goal, float(least)))
            return floor  # steps of a price are rounded, so the very least may be missed
        return shape

    def sparsity(self, masks: Masks) -> float:
        """Return the exact sparsity of masks once everything at 0 is cut, as a recount has it."""
        hard = {kind: (value > 0).cpu().double() for kind, value in masks.values.items()}
        kept = 1 - float(self.budget.expected_sparsity(Masks(self.layout, hard)))
        before = self.budget.before
        return (before - round(kept * before)) / before

    def goal(self, sparsity: float) -> Goal:
        """Return the goal of a sparsity, in [0, 1)."""
        before = self.budget.before

        def reach(least: float) -> str:
            most = math.floor(1000 * (1 - least / before)) / 10  # it can be reached
            return f"can remove at most {most:.1f}%"

        return Goal(
            Cost(self.budget),
            before * (1 - sparsity) + 1e-3,
            f"sparsity {sparsity:.1%}",
            reach,
            "ask for less",
        )

    def _out_of_reach(self, goal: Goal, least: float) -> str:
        """Say how far the gates reach, and which others would reach further."""
        kinds, further = self.constraints.kinds, []
        for kind in self.constraints.others:
            wider = replace(self.constraints, kinds=(*kinds, kind))
            if (reached := Allocator(self.budget, wider).least(goal.cost)) < least:
                further.append(f"with {kind} they {goal.reach(reached)}")
        more = (
            f"add kinds to --gates ({', '.join(further)})" if further else "no kind reaches further"
        )
        return (
            f"{goal.name} is out of reach: gates on {', '.join(kinds)} {goal.reach(least)} here; "
            f"{goal.instead}{', or ' if further else ': '}{more}"
        )

    def equal_scores(self) -> dict[str, Tensor]:
        """Return scores (N,) of 1 for every kind in use: used before units are scored."""
        return {k: torch.ones(self.layout.units(k)) for k in self.constraints.kinds}

    def chance(self, sparsity: float) -> Masks:
        """Return random masks at a sparsity, of about the shape that scores would lead to."""
        scores = self.chance_scores()
        return self.masks(self.shape(scores, sparsity), scores)

    def chance_scores(self) -> dict[str, Tensor]:
        """Return random scores (N,), with which each part loses about its share."""
        return chance(self.budget, self.constraints.kinds, seed=0)

    def maximum(self) -> float:
        """Return the largest sparsity that these constraints can express."""
        return 1 - self.least(Cost(self.budget)) / self.budget.before

    def least(self, cost: Priced) -> float:
        """Return the least that these constraints can bring a cost down to."""
        after = [
            a.after(width).min() + m.after(width).min() + cost.rest(width)
            for width, _, a, m in self._frontiers(self.equal_scores(), cost)
        ]
        return float(min(after))

    def masks(self, shape: Shape, scores: Scores) -> Masks:
        """Return 0/1 masks that keep the highest scores within a shape.

        Args:
            shape: dimensions that this model can be cut to.
            scores: loss of removing each unit, for every kind in use.
        """
        values: dict[str, list[Tensor]] = {kind: [] for kind in scores}
        for i, (old, new) in enumerate(zip(self.budget.shape.layers, shape.layers, strict=True)):
            parts = {k: scores[k].split(self.layout.sizes[k])[i] for k in scores if k != "hidden"}
            for kind, mask in layer_masks(old, new, parts).items():
                values[kind].append(mask)
        if "hidden" in scores:
            values["hidden"].append(top(scores["hidden"], shape.hidden))
        return Masks(self.layout, {kind: torch.cat(parts) for kind, parts in values.items()})

    def _slack(self, cost: Priced, attention: Frontier, mlp: Frontier) -> float:
        """How much more than the target may be removed: 0.1 point, or the smallest step."""
        shape, before = self.budget.shape, cost.total(self.budget.shape)
        steps = [
            options[0].price(shape.hidden) - option.price(shape.hidden)
            for options in (*attention.options, *mlp.options)
            for option in options[1:]
        ]
        if "hidden" in self.constraints.kinds:
            steps.append(before * self.constraints.hidden_multiple // shape.hidden)
        return max(0.001 * before, min((x for x in steps if x > 0), default=0))

    def _frontiers(
        self, scores: Scores, cost: Priced
    ) -> list[tuple[int, float, Frontier, Frontier]]:
        """Return (width, loss of the width, attention frontier, MLP frontier) for each width."""
        parts = {
            k: [p.numpy() for p in v.detach().double().cpu().split(self.layout.sizes[k])]
            for k, v in scores.items()
        }
        options = Options(cost, self.constraints, parts)
        layers, uniform = range(len(self.budget.shape.layers)), self.constraints.uniform
        attention, mlp = [*map(options.attention, layers)], [*map(options.mlp, layers)]
        if uniform:
            attention, mlp = (
                [shared_options([whole[i] for i in group]) for group in groups]
                for whole, groups in zip((attention, mlp), self._alike, strict=True)
            )
        divide = uniform and self.budget.family.heads_divide_hidden
        # Steps that stand for units are the same at any width, those of a price are not. Units of
        # attention count alike, but for a mixer that goes, and for heads with rows of a gate.
        by_units = (cost.by_units and are_proportional(attention), cost.by_units)
        same = all(by_units) and not divide
        found: list[tuple[int, float, Frontier, Frontier]] = []
        for width, loss in options.widths():
            fitting = [[o for o in x if not divide or width % o.kept.heads == 0] for x in attention]
            if same and found:
                found.append((width, loss, *found[0][2:]))
            elif all(fitting):
                priced = [
                    frontier(x if units else steps_by_price(x, width))
                    for x, units in zip((fitting, mlp), by_units, strict=True)
                ]
                found.append((width, loss, priced[0], priced[1]))
        if not found:
            raise UserError(
                "uniform shapes need a number of heads that divides the width, and none that these "
                "gates can leave does: add kv_groups or heads to --gates, or use --shapes free"
            )
        return found

    def _assemble(self, width: int, attention: list[LayerShape], mlp: list[LayerShape]) -> Shape:
        if self.constraints.uniform:
            attention, mlp = map(_spread, (attention, mlp), self._alike)
        pairs = zip(attention, mlp, strict=True)
        layers = (replace(m, heads=a.heads, kv_heads=a.kv_heads, mixer=a.mixer) for a, m in pairs)
        return Shape(width, tuple(layers))


def _grouped(kinds: Sequence[Any]) -> list[list[int]]:
    """Return the layers of each kind, given each layer's, in the order of their first ones."""
    return [[i for i, x in enumerate(kinds) if x == kind] for kind in dict.fromkeys(kinds)]


def _spread(kept: Sequence[LayerShape], groups: list[list[int]]) -> list[LayerShape]:
    """Return what each layer keeps, given what each group of layers does."""
    found = {i: counts for counts, group in zip(kept, groups, strict=True) for i in group}
    return [found[i] for i in range(len(found))]
