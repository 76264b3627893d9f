"""What a stage takes with many layers and batches, extrapolated from few.

A decoder's layers are alike, so each adds the same; and so does each batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedConfig

from nuteprune.errors import UserError
from nuteprune.model.shape import LayerShape
from nuteprune.plan.live import Live

SHORT = (2, 4)
"""Layers of the models that are run in place of a long one."""
ONE_BY_ONE = (1, 2)
"""The same for stages that go through a model layer by layer."""
PARTS_OF_LAYERS = (1, 2, 3)
"""The same for stages that cut single units: each trial runs all layers from the unit's on, so work
grows with the square."""


class Unplanned(UserError):
    """A model that cannot be planned without data, such as a mixture in fp32."""


@dataclass(frozen=True)
class Need:
    """The memory and work of a stage.

    Args:
        peaks: bytes that live at most, weights among them, in each stretch of it.
        flops: floating-point operations of products, for one pass through the stage.
        fine: those of `flops` that are not in half precision.
        sizes: how many sizes of products in half precision there are.
    """

    peaks: tuple[float, ...]
    flops: float = 0.0
    fine: float = 0.0
    sizes: float = 0.0

    @classmethod
    def of(cls, live: Live, peaks: Sequence[float] = ()) -> Need:
        """Return the counted need, in stretches with these peaks, or in one."""
        whole = (max([live.peak, *live.ticks]),)
        return cls(tuple(peaks) or whole, live.flops, live.fine, len(live.sizes))

    @property
    def peak(self) -> float:
        """Bytes that live at most."""
        return max(self.peaks)

    def held(self, more: float) -> Need:
        """Return the need with this many bytes held beside it."""
        return replace(self, peaks=tuple(x + more for x in self.peaks))

    def then(self, other: Need) -> Need:
        """Return the need of this and then another."""
        sums = (self.flops + other.flops, self.fine + other.fine, self.sizes + other.sizes)
        return Need(self.peaks + other.peaks, *sums)

    def times(self, count: float) -> Need:
        """Return the need of this many passes."""
        return replace(self, flops=self.flops * count, fine=self.fine * count)


def through(found: Sequence[tuple[float, Need]], at: float) -> Need:
    """Extrapolate needs to a place: work from all others, peaks from the last ones.

    Args:
        found: places, growing, and the needs there.
        at: the place.
    """

    def at_place(values: Sequence[float], places: Sequence[float]) -> float:
        return float(np.polyval(np.polyfit(places, values, len(places) - 1), at))

    places, needs = zip(*found, strict=True)
    whole, last = (lambda x: at_place(x, places)), (lambda x: at_place(x[-2:], places[-2:]))
    return Need(
        tuple(map(last, zip(*(x.peaks for x in needs), strict=True))),
        whole([x.flops for x in needs]),
        whole([x.fine for x in needs]),
        last([x.sizes for x in needs]),
    )


def extended(
    config: PreTrainedConfig,
    run: Callable[[PreTrainedConfig], Need],
    short: Sequence[int] = SHORT,
    layers: Sequence[LayerShape] = (),
) -> Need:
    """Return the need of a stage, extrapolated from fewer layers where a model has many.

    Args:
        config: of the whole model.
        run: runs the stage on a config.
        short: numbers of layers to run; where layers differ, of periods of layers.
        layers: facts of each layer that the config does not list, such as experts; none: alike.

    Raises:
        Unplanned: if its code asks for data.
    """
    count, period = int(config.num_hidden_layers), _until_all_kinds(config, layers)
    few = [max(x, period * (i + 1)) for i, x in enumerate(short)]
    try:
        if count <= few[-1] or hasattr(config, "pruned"):  # whose layers are not alike
            return run(config)
        return through([(x, run(shortened(config, x))) for x in few], count)
    except RuntimeError as error:  # of torch, which has several kinds for it
        said = str(error).partition("\n")[0]
        raise Unplanned(
            f"a run on {config.model_type} cannot be planned: its code does not go without data "
            f"({said}); pass --dtype bfloat16, or do one with --steps 1: it says what it held"
        ) from error


def _until_all_kinds(config: PreTrainedConfig, layers: Sequence[LayerShape]) -> int:
    """Return how many layers from the first there are until each kind was there."""
    types = getattr(config, "layer_types", None) or [""] * max(1, len(layers))
    kinds = [(x, layers[i] if layers else None) for i, x in enumerate(types)]
    return 1 + max(kinds.index(kind) for kind in set(kinds))


def in_batches(run: Callable[[int], Need], count: int, few: tuple[int, int]) -> Need:
    """Return the need of a stage for many blocks, from two runs on few.

    Args:
        run: runs the stage on a number of blocks.
        count: how many there are.
        few: how many are run in place of them.
    """
    return run(count) if count <= few[-1] else through([(x, run(x)) for x in few], count)


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the config of the same model with fewer layers."""
    values = copy.deepcopy(config.to_dict()) | {"num_hidden_layers": layers}
    if isinstance(kinds := values.get("layer_types"), list):
        values["layer_types"] = kinds[:layers]
    return type(config).from_dict(values)
