"""Which units stay: an exact knapsack from scores to a shape that can be exported.

Every unit has a score, the loss that removing it is expected to cost; scores add up. Units go in
exportable steps (KV groups, query heads alike in all groups of a layer, multiples of neurons and of
the width, whole blocks), alike in all layers where shapes are uniform. Within a layer the lowest
scores go first, so a block has few *options*; the options of all layers combine into a *frontier*
(the least loss for every number of steps), one for attention, one for MLPs; the width is tried at
each multiple. A model's parameters are hidden x coefficient + constant, so that the best
combination is found by enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nuteprune.errors import UserError
from nuteprune.gates.budget import Budget
from nuteprune.gates.frontier import Array, Frontier, Option, alike, cheapest, frontier
from nuteprune.gates.masks import Layout, Masks
from nuteprune.gates.units import chance
from nuteprune.model.shape import LayerShape, Shape

Scores = Mapping[str, Tensor]
"""Kind of gate -> (N,), the non-negative loss of removing each unit."""


@dataclass(frozen=True)
class Constraints:
    """Which shapes may come out.

    Args:
        kinds: the kinds of gates in use; everything else stays whole.
        uniform: the same counts in every layer.
        neuron_multiple: neurons kept per layer are a multiple of it (or all of them).
        hidden_multiple: the width kept is a multiple of it (or all of it).
        floor: dimensions to keep at least, those that the user chose; None: no such wish.
    """

    kinds: tuple[str, ...]
    uniform: bool = False
    neuron_multiple: int = 32
    hidden_multiple: int = 64
    floor: Shape | None = None


class Allocator:
    """Finds a model's exportable shape of least loss at a sparsity.

    Args:
        budget: the model's parameter count.
        constraints: which shapes may come out.

    Raises:
        UserError: if shapes are to be uniform and the model's layers differ already.
    """

    def __init__(self, budget: Budget, constraints: Constraints) -> None:
        self.budget = budget
        self.constraints = constraints
        self.layout = Layout(budget.shape, budget.head_dim)
        # So that as many steps are as many neurons, whichever layers they come from.
        counts = (layer.neurons for layer in budget.shape.layers)
        self._neurons_per_step = math.gcd(constraints.neuron_multiple, *counts)
        if constraints.uniform and not budget.shape.uniform:
            raise UserError(
                "uniform shapes need a model whose layers are alike, and this model's differ "
                "already: use --shapes free"
            )

    def shape(self, scores: Scores, sparsity: float) -> Shape:
        """Return the shape of least loss that removes at least `sparsity` of the parameters.

        At most one smallest step (or 0.1 point) more than that goes.

        Args:
            scores: loss of removing each unit, for every kind in use.
            sparsity: share of the projection parameters to remove, in [0, 1).

        Raises:
            UserError: if the gates cannot remove that much; names the most that they can.
        """
        limit = self.budget.before * (1 - sparsity) + 1e-3
        best: tuple[float, float] | None = None
        shape = self.budget.shape
        least = np.inf
        frontiers = self._frontiers(scores)
        slack = self._slack(*frontiers[0][2:])
        for width, width_loss, attention, mlp in frontiers:
            after_a, exact_m = attention.after(width), mlp.after(width)
            after_m = np.minimum.accumulate(exact_m)
            least = min(least, after_a.min() + after_m[-1])
            # The first number of MLP steps that is enough, for each number of attention steps.
            enough = np.searchsorted(-after_m, -(limit - after_a), side="left")
            a = np.flatnonzero(enough < len(after_m))
            if not len(a):
                continue
            loss_m = np.where(exact_m <= after_m, mlp.loss_S, np.inf)
            m = cheapest(loss_m, enough[a], after_m, limit - after_a[a] - slack)
            excess = np.maximum(0.0, limit - after_a[a] - after_m[m] - slack)
            loss = attention.loss_S[a] + mlp.loss_S[m] + width_loss
            i = np.lexsort((loss, excess))[0]
            if best is None or (excess[i], loss[i]) < best:
                best = (float(excess[i]), float(loss[i]))
                shape = self._assemble(width, attention.counts(int(a[i])), mlp.counts(int(m[i])))
        if best is None:
            most = math.floor(1000 * (1 - least / self.budget.before)) / 10  # it can be reached
            raise UserError(
                f"sparsity {sparsity:.1%} is out of reach: gates on "
                f"{', '.join(self.constraints.kinds)} can remove at most "
                f"{most:.1f}% here, since every layer keeps at least "
                "one KV head and one multiple of neurons; ask for less, or add kinds to --gates"
            )
        return shape

    def equal_scores(self) -> dict[str, Tensor]:
        """Return scores (N,) of 1 for every kind in use: what is asked before units are scored."""
        return {k: torch.ones(self.layout.units(k)) for k in self.constraints.kinds}

    def chance(self, sparsity: float) -> Masks:
        """Return masks at a sparsity by chance: of about the shape that scores would lead to."""
        scores = chance(self.budget, self.layout, self.constraints.kinds, seed=0)
        return self.masks(self.shape(scores, sparsity), scores)

    def maximum(self) -> float:
        """Return the largest sparsity that these constraints can express."""
        after = [
            a.after(width).min() + m.after(width).min()
            for width, _, a, m in self._frontiers(self.equal_scores())
        ]
        return 1 - float(min(after)) / self.budget.before

    def masks(self, shape: Shape, scores: Scores) -> Masks:
        """Return 0/1 masks that keep the highest scores within a shape.

        Args:
            shape: dimensions that this model can be cut to.
            scores: loss of removing each unit, for every kind in use.
        """
        values: dict[str, list[Tensor]] = {kind: [] for kind in scores}
        for i, (old, new) in enumerate(zip(self.budget.shape.layers, shape.layers, strict=True)):
            parts = {k: scores[k].split(self.layout.sizes[k])[i] for k in scores if k != "hidden"}
            for kind, mask in _layer_masks(old, new, parts).items():
                values[kind].append(mask)
        if "hidden" in scores:
            values["hidden"].append(_top(scores["hidden"], shape.hidden))
        return Masks(self.layout, {kind: torch.cat(parts) for kind, parts in values.items()})

    def _slack(self, attention: Frontier, mlp: Frontier) -> float:
        """How much more than the target may go: 0.1 point, or the smallest step."""
        width = self.budget.shape.hidden
        steps = [
            (options[0].coefficient - option.coefficient) * width
            + options[0].constant
            - option.constant
            for options in (*attention.options, *mlp.options)
            for option in options[1:]
        ]
        if "hidden" in self.constraints.kinds:
            steps.append(self.budget.before * self.constraints.hidden_multiple // width)
        return max(0.001 * self.budget.before, min(steps, default=0))

    def _frontiers(self, scores: Scores) -> list[tuple[int, float, Frontier, Frontier]]:
        """Return (width, loss of the width, attention frontier, MLP frontier) for each width."""
        parts = {
            k: [p.numpy() for p in v.detach().double().cpu().split(self.layout.sizes[k])]
            for k, v in scores.items()
        }
        layers = range(len(self.budget.shape.layers))
        attention = [self._attention_options(parts, i) for i in layers]
        mlp = [self._mlp_options(parts, i) for i in layers]
        widths = self._widths(parts)
        if not self.constraints.uniform:
            joint = frontier(attention), frontier(mlp)
            return [(width, loss, *joint) for width, loss in widths]
        found = []
        for width, loss in widths:
            fitting = [
                option
                for option in alike(attention)
                if not self.budget.family.heads_divide_hidden or width % option.kept[0] == 0
            ]
            if fitting:
                found.append((width, loss, frontier([fitting]), frontier([alike(mlp)])))
        return found

    def _widths(self, parts: Mapping[str, list[Array]]) -> list[tuple[int, float]]:
        width, multiple = self.budget.shape.hidden, self.constraints.hidden_multiple
        if "hidden" not in parts:
            return [(width, 0.0)]
        gone = np.concatenate([[0.0], np.cumsum(np.sort(parts["hidden"][0]))])
        floor = self.constraints.floor
        kept = _counts(width, multiple, floor.hidden if floor else 0)
        return [(k, float(gone[width - k])) for k in kept]

    def _attention_options(self, parts: Mapping[str, list[Array]], layer: int) -> list[Option]:
        whole = self.budget.shape.layers[layer]
        if not whole.attention:
            return [Option(0, 0.0, 0, 0, (0, 0))]
        per_group = whole.heads_per_group
        groups, inner = whole.kv_heads, per_group
        group_G, head_GR = np.zeros(groups), np.zeros((groups, inner))
        if "kv_groups" in parts:
            group_G = parts["kv_groups"][layer]
        if "heads" in parts:
            head_GR = parts["heads"][layer].reshape(groups, inner)
        cuts_groups = "kv_groups" in parts or ("heads" in parts and inner == 1)
        cuts_heads = "heads" in parts and inner > 1
        all_steps = groups * (inner + 1)
        options = []
        for r in range(inner, 0, -1) if cuts_heads else [inner]:
            inside_G = np.sort(head_GR, axis=1)[:, : inner - r].sum(axis=1)
            whole_G = group_G if "kv_groups" in parts else head_GR.sum(axis=1)
            extra = np.concatenate([[0.0], np.cumsum(np.sort(whole_G - inside_G))])
            for g in range(groups, 0, -1) if cuts_groups else [groups]:
                kept = LayerShape(g * r, g, 0)
                options.append(
                    Option(
                        all_steps - g * (r + 1),
                        float(inside_G.sum() + extra[groups - g]),
                        *self.budget.attention(kept),
                        (kept.heads, kept.kv_heads),
                    )
                )
        if "attn_block" in parts and layer > 0:
            options.append(Option(all_steps, float(parts["attn_block"][layer][0]), 0, 0, (0, 0)))
        floor = self._floor(layer)
        return [o for o in options if o.kept[0] >= floor.heads and o.kept[1] >= floor.kv_heads]

    def _floor(self, layer: int) -> LayerShape:
        floor = self.constraints.floor
        return floor.layers[layer] if floor else LayerShape(0, 0, 0)

    def _mlp_options(self, parts: Mapping[str, list[Array]], layer: int) -> list[Option]:
        total = self.budget.shape.layers[layer].neurons
        if not total:
            return [Option(0, 0.0, 0, 0, (0,))]
        floor = self._floor(layer).neurons
        kept = [total]
        gone = np.zeros(total + 1)
        if "neurons" in parts:
            gone[1:] = np.cumsum(np.sort(parts["neurons"][layer]))
            kept = _counts(total, self.constraints.neuron_multiple, floor)
        options = [
            Option(
                -(-(total - n) // self._neurons_per_step),
                float(gone[total - n]),
                *self.budget.mlp(LayerShape(0, 0, n)),
                (n,),
            )
            for n in kept
        ]
        if "mlp_block" in parts and not floor:
            steps = total // self._neurons_per_step
            options.append(Option(steps, float(parts["mlp_block"][layer][0]), 0, 0, (0,)))
        return options

    def _assemble(
        self, width: int, attention: list[tuple[int, ...]], mlp: list[tuple[int, ...]]
    ) -> Shape:
        if self.constraints.uniform:
            count = len(self.budget.shape.layers)
            attention, mlp = attention * count, mlp * count
        pairs = zip(attention, mlp, strict=True)
        return Shape(width, tuple(LayerShape(a[0], a[1], m[0]) for a, m in pairs))


def _counts(total: int, multiple: int, floor: int) -> list[int]:
    """Return what may be kept of `total`: all, the multiples, and the floor where there is one."""
    multiples = range((total - 1) // multiple * multiple, floor, -multiple)
    return [total, *multiples, *([floor] if 0 < floor < total else [])]


def _top(scores: Tensor, count: int) -> Tensor:
    """Return a 0/1 mask of the `count` highest scores; ties go to the lower index."""
    order = torch.argsort(scores, descending=True, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.float32)
    mask[order[:count]] = 1.0
    return mask


def _layer_masks(
    old: LayerShape, new: LayerShape, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return one layer's 0/1 masks: the highest scores within the new counts."""
    masks = {k: torch.ones_like(v, dtype=torch.float32) for k, v in scores.items()}
    if "attn_block" in masks and not new.attention:
        masks["attn_block"].zero_()
    if "mlp_block" in masks and not new.mlp:
        masks["mlp_block"].zero_()
    if "neurons" in masks and new.mlp:
        masks["neurons"] = _top(scores["neurons"], new.neurons)
    if not new.attention:
        return masks
    if "heads" in masks and old.heads_per_group > 1:
        rows = scores["heads"].reshape(old.kv_heads, -1)
        masks["heads"] = torch.cat([_top(row, new.heads_per_group) for row in rows])
    elif "heads" in masks and "kv_groups" not in masks:  # else the group of one head decides
        masks["heads"] = _top(scores["heads"], new.heads)
    if "kv_groups" in masks:
        group_scores = scores["kv_groups"]
        if "heads" in masks and old.heads_per_group > 1:
            group_scores = group_scores - (
                scores["heads"].reshape(old.kv_heads, -1)
                * (1 - masks["heads"].reshape(old.kv_heads, -1))
            ).sum(1)
        masks["kv_groups"] = _top(group_scores, new.kv_heads)
    return masks
