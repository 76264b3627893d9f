"""Masks that keep the highest scores within a layer's counts.

Shape suffixes: E experts, F neurons of each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nuteprune.model.shape import LayerShape


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
    if "heads" in masks and old.heads_per_group > 1:
        rows = scores["heads"].reshape(old.kv_heads, -1)
        masks["heads"] = torch.cat([top(row, new.heads_per_group) for row in rows])
    elif "heads" in masks and "kv_groups" not in masks:  # else the group of one head decides
        masks["heads"] = top(scores["heads"], new.heads)
    if "kv_groups" in masks:
        group_scores = scores["kv_groups"]
        if "heads" in masks and old.heads_per_group > 1:
            group_scores = group_scores - (
                scores["heads"].reshape(old.kv_heads, -1)
                * (1 - masks["heads"].reshape(old.kv_heads, -1))
            ).sum(1)
        masks["kv_groups"] = top(group_scores, new.kv_heads)
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
