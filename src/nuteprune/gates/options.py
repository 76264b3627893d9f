"""The ways to keep part of a block: steps, their loss, their price, and which units stay then.

Shape suffixes: G KV heads, R query heads of each, E experts, F neurons of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nuteprune.gates.costs import Priced
from nuteprune.gates.frontier import Array, Option
from nuteprune.model.shape import LayerShape, Shape

NOTHING = LayerShape(0, 0, 0)
"""What is left of a layer whose blocks are gone."""


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
    neuron_multiple: int = 32
    hidden_multiple: int = 64
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
        # So that as many steps are as many neurons, whichever layers they come from.
        counts = (layer.neurons for layer in self._shape.layers)
        self._neurons_per_step = math.gcd(constraints.neuron_multiple, *counts)

    def widths(self) -> list[tuple[int, float]]:
        """Return (width, loss) of all widths that may be kept, the whole one first."""
        width, multiple = self._shape.hidden, self.constraints.hidden_multiple
        if "hidden" not in self.parts:
            return [(width, 0.0)]
        gone = _least_sums(self.parts["hidden"][0])
        floor = self.constraints.floor
        kept = _counts(width, multiple, floor.hidden if floor else 0)
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
        floor = self._floor(layer)
        return [
            option
            for option in options
            if option.kept.heads >= floor.heads and option.kept.kv_heads >= floor.kv_heads
        ]

    def _mixer(self, layer: int) -> list[Option]:
        """Return the options of a layer without heads: its mixer stays as a whole or goes."""
        whole, parts = self._shape.layers[layer], self.parts
        kept = LayerShape(0, 0, 0, mixer=whole.mixer)
        options = [Option(0, 0.0, *self.cost.attention(layer, kept), kept)]
        if whole.mixer and "attn_block" in parts and not self._floor(layer).mixer:
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
        if "mlp_block" in parts and not self._floor(layer).mlp:
            steps = total // self._neurons_per_step
            options.append(Option(steps, float(parts["mlp_block"][layer][0]), 0, 0, NOTHING))
        return options

    def _neurons(self, layer: int) -> list[tuple[int, float]]:
        """Return (neurons, loss) of what may be kept of those outside of experts."""
        total = self._shape.layers[layer].neurons
        if "neurons" not in self.parts or not total:
            return [(total, 0.0)]
        gone = _least_sums(self.parts["neurons"][layer])
        floor = self._floor(layer).neurons
        kept = _counts(total, self.constraints.neuron_multiple, floor)
        return [(n, float(gone[total - n])) for n in kept]

    def _experts(self, layer: int) -> list[tuple[int, int, float]]:
        """Return (experts, neurons of each, loss) of what may be kept of routed experts."""
        whole, parts, floor = self._shape.layers[layer], self.parts, self._floor(layer)
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

    def _floor(self, layer: int) -> LayerShape:
        floor = self.constraints.floor
        return floor.layers[layer] if floor else NOTHING


def _least_sums(losses: Array) -> Array:
    """Return the sums of the least 0, 1, 2 ... losses."""
    return np.concatenate([[0.0], np.cumsum(np.sort(losses))])


def _counts(total: int, multiple: int, floor: int) -> list[int]:
    """Return what may be kept of `total`: all, the multiples, and the floor where there is one."""
    multiples = range((total - 1) // multiple * multiple, floor, -multiple)
    return [total, *multiples, *([floor] if 0 < floor < total else [])]


def top(scores: Tensor, count: int) -> Tensor:
    """Return a 0/1 mask of the `count` highest scores; ties go to the lower index."""
    order = torch.argsort(scores, descending=True, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.float32)
    mask[order[:count]] = 1.0
    return mask


def layer_masks(
    old: LayerShape, new: LayerShape, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return one layer's 0/1 masks: the highest scores within the new counts.

    Args:
        old: the layer's counts.
        new: those that it is cut to.
        scores: kind of gate, `hidden` excepted -> loss of removing each unit (n,).
    """
    masks = {k: torch.ones_like(v, dtype=torch.float32) for k, v in scores.items()}
    if "attn_block" in masks and not new.mixes:
        masks["attn_block"].zero_()
    if "mlp_block" in masks and not new.mlp:
        masks["mlp_block"].zero_()
    if "neurons" in masks and new.neurons:
        masks["neurons"] = top(scores["neurons"], new.neurons)
    if new.experts:
        masks |= _expert_masks(old, new, scores)
    if not new.attention:
        return masks
    lost_G = torch.zeros(old.kv_heads)
    if "heads" in masks and old.heads_per_group > 1:
        heads_GR = scores["heads"].reshape(old.kv_heads, -1)
        kept_GR = torch.stack([top(row, new.heads_per_group) for row in heads_GR])
        lost_G = (heads_GR * (1 - kept_GR)).sum(1)
        masks["heads"] = kept_GR.flatten()
    elif "heads" in masks and "kv_groups" not in masks:  # else the group of one head decides
        masks["heads"] = top(scores["heads"], new.heads)
    if "kv_groups" in masks:
        whole_G = scores["kv_groups"]
        masks["kv_groups"] = top(whole_G - lost_G.to(whole_G), new.kv_heads)
    return masks


def _expert_masks(
    old: LayerShape, new: LayerShape, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the 0/1 masks of one layer's experts and of their neurons, as far as scored."""
    masks: dict[str, Tensor] = {}
    lost_E = torch.zeros(old.experts)
    if "expert_neurons" in scores:
        inner_EF = scores["expert_neurons"].reshape(old.experts, -1)
        kept_EF = torch.stack([top(row, new.expert_neurons) for row in inner_EF])
        lost_E = (inner_EF * (1 - kept_EF.to(inner_EF))).sum(1)
        masks["expert_neurons"] = kept_EF.flatten()
    if "experts" in scores:
        masks["experts"] = top(scores["experts"] - lost_E.to(scores["experts"]), new.experts)
    return masks
