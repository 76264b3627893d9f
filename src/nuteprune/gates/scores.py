"""What scoring reads (model, parameter count, text) and returns: losses, also made from ranks.

By them the masks of a layer are chosen that keep the highest.

Shape suffixes: B batch, T tokens, U units of a layer, N units of one kind in the whole model; of a
layer G KV heads, R query heads of each, E experts, F neurons of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nuteprune.errors import RunFailed
from nuteprune.gates.budget import Budget, unit_parameters
from nuteprune.gates.masks import Layout
from nuteprune.model.anatomy import Anatomy, no_logits
from nuteprune.model.family import BLOCK_KINDS
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.shape import LayerShape
from nuteprune.processes import ALONE, Team
from nuteprune.simulated import usual

LOSS_SCALE = 2.0**10
"""Factor on a loss before its backward pass, and divisor of gradients after it: float16 would round
small gradients to 0. A power of two, so nothing else changes."""
Scores = dict[str, Tensor]
"""Kind -> (N,) losses in fp32 on the CPU."""


@dataclass(frozen=True)
class Probe:
    """A model, and the text to score its units on.

    Args:
        anatomy: the dense model; its parameters are frozen, or their gradients are not wanted.
        hooks: where masks multiply in it.
        budget: its parameter count.
        kinds: which kinds of gates to score.
        batches: token ids (B, T) of calibration text.
        plain_batches: token ids (B, T), T the same in all: the longer text that some methods read
            without gradients.
        seed: draws the random scores, and tokens from the model.
        progress: called after each batch.
        cut_by: from scores of all kinds to masks, of which 0 marks what goes at the target; None:
            no target is known.
        team: the processes that share the scoring out, all of which have all batches.
    """

    anatomy: Anatomy
    hooks: MaskHooks
    budget: Budget
    kinds: tuple[str, ...]
    batches: Sequence[Tensor] = ()
    plain_batches: Sequence[Tensor] = ()
    seed: int = 0
    progress: Callable[[], None] = lambda: None
    cut_by: Callable[[Scores], Mapping[str, Tensor]] | None = None
    team: Team = ALONE

    @property
    def layout(self) -> Layout:
        """The model's units."""
        return self.budget.layout

    def own_batches(self) -> Iterator[Tensor]:
        """Yield this process's share of the batches; `progress` is told of all."""
        for i, ids_BT in enumerate(self.batches):
            if self.team.is_mine(i):
                yield ids_BT
            self.progress()

    @torch.no_grad()
    def read(self) -> None:
        """Run this process's share of the text through the model, for the hooks that watch."""
        device = self.anatomy.model.device
        for ids_BT in self.own_batches():
            ids_BT = ids_BT.to(device)
            kept = no_logits(ids_BT)
            self.anatomy.model(input_ids=ids_BT, use_cache=False, logits_to_keep=kept)


def check_finite(values: Iterable[Tensor], method: str) -> None:
    """Refuse scores that are not finite.

    Raises:
        RunFailed: if there are any.
    """
    if not all(usual(value.isfinite().all()) for value in values):
        raise RunFailed(f"scoring by {method} gave scores that are not finite: use --dtype float32")


def ranks(layout: Layout, kind: str, scores: Tensor, by_layer: bool = True) -> Tensor:
    """Return the rank (N,) of each unit within its layer, in (0, 1), the best highest.

    Blocks are ranked among the blocks of their kind in the model, as is any unit without
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
    """Reassign each layer's losses to its units: the least loss to the unit in first place.

    Args:
        sizes: units of each layer.
        losses: of removing each unit (N,).
        places: the order in which units go (N,).
    """
    parts = []
    for loss_U, place_U in zip(losses.split(sizes), places.split(sizes), strict=True):
        order_U = place_U.argsort(stable=True)
        parts.append(torch.empty_like(loss_U).index_copy(0, order_U, loss_U.sort().values))
    return torch.cat(parts)


def chance(budget: Budget, kinds: Iterable[str], seed: int) -> dict[str, Tensor]:
    """Return u x parameters of each unit, u uniform in (0, 1): each part loses about its share."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {kind: torch.rand(budget.layout.units(kind), generator=generator) for kind in kinds}
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
