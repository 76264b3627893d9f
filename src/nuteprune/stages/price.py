"""Price: what units cost where they are to go, measured in the model that is cut and refitted.

Scores are predictions: of one projection at a time, near the dense model. Where much is cut
together, some layers cost a multiple of what was predicted, and some next to nothing. So the stage
tries changes of the cut: each layer loses a few neurons more, or fewer, and single units of
attention go, or come back. For each change it refits the projection that reads the units, and
measures the KL divergence from the dense model, on text that the refit did not read. Scores follow
half-way. Source: that a cut is judged by the true loss of the whole model, EvoPress (Sieberling et
al. 2024, arXiv 2410.14649), which searches by it. Here it corrects scores. Measured in docs/log.md.

Shape suffixes: T tokens, V vocabulary, U units of a layer, N blocks, or units of one kind in
the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from statistics import median

import torch
from torch import Tensor

from nuteprune.console import Progress, counted, silent
from nuteprune.gates.copying_losses import Predicted, mean_kl
from nuteprune.gates.costs import Goal
from nuteprune.gates.masks import Layout, Masks
from nuteprune.gates.scores import Scores, check_finite
from nuteprune.gates.surgeon import INPUTS
from nuteprune.model.family import Projection
from nuteprune.model.forwards import giving, noting_outputs
from nuteprune.processes import ALONE, everyone
from nuteprune.shrink.least_squares import Note, Regression
from nuteprune.simulated import alike, left, number
from nuteprune.stages.choose import choose
from nuteprune.stages.prunable import Prunable
from nuteprune.stages.refit import refit
from nuteprune.stages.score import PLAIN_BATCH

UNITS = 4
"""At most this many attention units per layer are priced on each side of the threshold."""
NEAR = 2.0
"""Their scores are within this factor of the threshold. Pricing all units removed the same ones of
the demo model, at 20 and at 50 % (docs/log.md)."""
USUALLY = 0.45
"""About this share of attention units is priced: 0.33 of the demo model's at 20 %, 0.45 at 50 %."""
FURTHER = 1 / 12
"""Share of its neurons that a layer loses more, or less, when it is priced."""
TRUST = 0.5
"""Scores are multiplied by (measured / predicted cost) to this power: half-way, since many changes
that are small alone are not small together."""
MOST = 10.0
"""That ratio is at most this, and at least one over it: few blocks measure it badly."""


def price(
    model: Prunable,
    scores: Scores,
    target: float | Goal,
    blocks: Tensor,
    refit_blocks: Tensor,
    *,
    batch_size: int = 4,
    progress: Progress = silent,
) -> Scores:
    """Return scores moved half-way to the measured cost of cuts at the target.

    Args:
        model: the model, whose cuts can be tried; see `Prunable.can_try_cuts`.
        scores: kind -> (N,), as `score` returned them.
        target: share of the decoder's projection parameters to remove, or another goal.
        blocks: token ids (N, T) that costs are measured on; the refit does not read them.
        refit_blocks: token ids (N, T) that the refit reads.
        batch_size: blocks that go through a layer together in the refit.
        progress: told of the refit, and of each change.

    Raises:
        RunFailed: if what is measured is not finite.
    """
    masks = choose(model, scores, target)
    multiple = model.allocator.constraints.neuron_multiple
    cut = masks.to("cpu")
    changes = changes_of(cut, scores, multiple)
    measure = Measure(model, blocks)
    note = measure.note(cut, changes)
    weights = refit(model, masks, refit_blocks, batch_size=batch_size, progress=progress, note=note)
    # Counted from here, so that the refit is not taken for the time of a change.
    tick = counted(progress, "price", len(model.team.mine(changes)))
    with model.bank.using_weights(weights):
        prices = measure.prices(tick)
    check_finite([torch.tensor(list(prices.values()))], "price")
    return following(scores, prices, model.layout)


@dataclass(frozen=True)
class Change:
    """Another way to cut a layer.

    Args:
        kind: kind of the units that go, or come back.
        layer: the layer that has them.
        units: their indices in the layer.
        back: whether they come back.
    """

    kind: str
    layer: int
    units: tuple[int, ...]
    back: bool

    @property
    def followers(self) -> tuple[str, int, tuple[int, ...]]:
        """The units that it prices: all neurons of a layer, or a unit of attention."""
        return self.kind, self.layer, () if self.kind == "neurons" else self.units

    def of(self, masks: Masks) -> Masks:
        """Return masks with the change made."""
        values = {kind: value.clone() for kind, value in masks.values.items()}
        part_U = values[self.kind].split(masks.layout.sizes[self.kind])[self.layer]
        part_U[list(self.units)] = float(self.back)
        return Masks(masks.layout, values)


def changes_of(masks: Masks, scores: Scores, multiple: int) -> list[Change]:
    """Return the changes of a cut that are to be measured.

    The first attention is left out: it goes last of all, whatever a few blocks say; see
    `gates.importance.first_attention_last`. So is attention far from the cut, and what would leave
    nothing of a layer.

    Args:
        masks: the cut, 0 and 1, on the CPU.
        scores: of all units.
        multiple: neurons go and come in multiples of it.
    """

    def further(neurons: int) -> int:
        return max(1, round(neurons * FURTHER / multiple)) * multiple

    found = []
    for kind, value_N in masks.values.items():
        sizes = masks.layout.sizes[kind]
        near_N = _near_the_cut(value_N, scores[kind])
        if kind == "neurons":
            near_N.fill_(True)
        layers = zip(*(x.split(sizes) for x in (value_N, scores[kind], near_N)), strict=True)
        for layer, (mask_U, score_U, near_U) in enumerate(layers):
            order_U = score_U.argsort()
            cheapest = order_U[mask_U[order_U] > 0]  # of those that stay
            dearest = order_U[mask_U[order_U] == 0].flip(0)  # of those that went
            each, most = 1, UNITS * (layer != masks.layout.shape.first_attention)
            if kind == "neurons":
                each, most = further(len(mask_U)), 1
            going = [x for x in cheapest.split(each)[:most] if len(x) < len(cheapest)]
            coming = [x for x in dearest.split(each)[:most] if len(x)]
            for back, parts in enumerate((going, coming)):
                near = [x for x in parts if near_U[x].all()]
                found += [Change(kind, layer, tuple(x.tolist()), bool(back)) for x in near]
    return found


def _near_the_cut(mask_N: Tensor, score_N: Tensor) -> Tensor:
    """Return which scores are near the largest removed one (if none is removed, the smallest)."""
    gone_N = mask_N == 0
    cut = score_N[gone_N].max() if gone_N.any() else score_N.min()
    return (score_N > cut / NEAR) & (score_N < cut * NEAR)


def most_changes(kind: str, units: int) -> int:
    """Return how many changes of a layer are measured at most.

    Args:
        kind: of its units.
        units: how many it has of that kind.
    """
    return min(units, 2 if kind == "neurons" else 2 * UNITS)


def usual_changes(kind: str, units: int) -> float:
    """Return how many changes of a layer are usually measured; arguments as `most_changes`."""
    return most_changes(kind, units) * (1 if kind == "neurons" else USUALLY)


@dataclass(frozen=True)
class Tried:
    """A change, and the weight that the projection has with it.

    Args:
        change: the change.
        projection: the one that reads the units.
        weight_OI: its weight, in the model's dtype; see `LoraBank.put_away`.
    """

    change: Change
    projection: Projection
    weight_OI: Tensor


class Measure:
    """Measures what changes of a cut cost; made while the model is dense.

    All processes refit to all changes together. Each then measures its share of them; or where
    weights are sharded, all of them, on its share of the text.

    Args:
        model: the model.
        blocks: token ids (N, T) that tell.
    """

    @torch.no_grad()
    def __init__(self, model: Prunable, blocks: Tensor) -> None:
        self._model, self._count = model, len(blocks)
        # All have to read as many batches: each gathers the model.
        readers = everyone() if model.is_sharded else ALONE
        self._readers = ALONE if len(blocks) % readers.size else readers
        self._batches = blocks[self._readers.rank :: self._readers.size].split(PLAIN_BATCH)
        self._changes: list[Change] = []  # in the order in which they are refitted to
        self._tried: list[Tried] = []  # those of this process
        with model.hooks.using(None):
            self._dense = [Predicted.of(logits_of(model, x)) for x in self._batches]

    def note(self, masks: Masks, changes: Sequence[Change]) -> Note:
        """Return what refits projections to changes of a cut, while the cut is refitted.

        Args:
            masks: the cut, on the CPU.
            changes: of it.
        """
        anatomy, bank, team = self._model.anatomy, self._model.bank, self._model.team

        def note(layer: int, block: str, regression: Regression, _: Tensor) -> None:
            for change in changes:
                if change.layer == layer and INPUTS[change.kind] == block:
                    mask_I = change.of(masks).inputs(layer)[block]
                    assert mask_I is not None
                    weight_OI = left(regression.fit(mask_I).to("cpu", anatomy.model.dtype))
                    self._changes.append(change)
                    if not team.is_mine(len(self._changes) - 1):
                        continue
                    projection = anatomy.ends(layer)[block]
                    self._tried.append(Tried(change, projection, bank.put_away(weight_OI)))

        return note

    @torch.no_grad()
    def prices(self, tick: Callable[[], None]) -> dict[Change, float]:
        """Return what the changes cost, in nats a token: how much further off the model is.

        The model is cut and refitted now: columns of what is gone are 0.

        Args:
            tick: called after each change that this process measures.
        """
        model, found = self._model, dict[Change, float]()
        layers = model.anatomy.layers
        with model.hooks.using(None):
            own, outputs = [], []
            for batch in range(len(self._batches)):
                with noting_outputs(layers) as noted:
                    own.append(self._loss(batch))
                outputs.append(noted)
            by_weight = groupby(self._tried, lambda x: (x.change.layer, x.projection.path))
            each = (alike(list(same), model.anatomy.embedding.weight) for _, same in by_weight)
            for tried in chain.from_iterable(each):
                layer, projection = tried.change.layer, tried.projection
                losses = []
                with model.bank.trying(layer, projection, tried.weight_OI):
                    for batch, noted in enumerate(outputs):
                        with giving(layers[:layer], noted[:layer]):  # which give what they gave
                            losses.append(self._loss(batch))
                found[tried.change] = number(torch.stack(losses).sum() - torch.stack(own).sum())
                tick()
        prices_N = torch.tensor([found.get(x, 0.0) for x in self._changes], dtype=torch.float64)
        for team in (model.team, self._readers):
            team.add_up([prices_N])
        return dict(zip(self._changes, prices_N.tolist(), strict=True))

    def _loss(self, batch: int) -> Tensor:
        """Return a batch's share of the mean over all blocks."""
        ids_BT = self._batches[batch]
        return mean_kl(self._dense[batch], logits_of(self._model, ids_BT)) * (
            len(ids_BT) / self._count
        )


def logits_of(model: Prunable, ids_BT: Tensor) -> Tensor:
    """Return the logits (B x T, V) of a model, as it is."""
    ids_BT = ids_BT.to(model.device)
    logits_BTV: Tensor = model.anatomy.model(input_ids=ids_BT, use_cache=False).logits
    return logits_BTV.flatten(0, 1)


def following(scores: Scores, prices: Mapping[Change, float], layout: Layout) -> Scores:
    """Return scores moved half-way to the measured costs.

    Only relative costs matter, so all are compared with the median.

    Args:
        scores: kind -> (N,), as they were when the changes were made.
        prices: change -> what it costs.
        layout: the model's units.
    """
    found = {kind: value.clone() for kind, value in scores.items()}
    parts = {kind: value.split(layout.sizes[kind]) for kind, value in found.items()}
    measured: dict[tuple[str, int, tuple[int, ...]], list[tuple[float, float]]] = {}
    for change, price in prices.items():
        predicted = float(parts[change.kind][change.layer][list(change.units)].sum())
        both = (-price, predicted) if change.back else (price, predicted)
        measured.setdefault(change.followers, []).append(both)
    ratios = {
        key: max(0.0, sum(x for x, _ in both)) / total
        for key, both in measured.items()
        if (total := sum(x for _, x in both)) > 0
    }
    usual = median([x for x in ratios.values() if x > 0] or [1.0])
    for (kind, layer, units), ratio in ratios.items():
        factor = min(max(ratio / usual, 1 / MOST), MOST) ** TRUST
        part_U = parts[kind][layer]
        part_U[list(units) if units else slice(None)] *= factor
    return found
