"""What a phase takes of a long model and of many batches, by short models and few batches.

A decoder's layers are alike, so each adds the same; and so does each batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace

from transformers import PreTrainedConfig

from nuteprune.errors import UserError
from nuteprune.model.shape import LayerShape
from nuteprune.simulated import Live

SHORT = (2, 4)
"""Layers of the two models that are run in place of a long one."""
ONE_BY_ONE = (1, 2)
"""The same for what goes through a model layer by layer."""
FEW = (2, 3)
"""Batches that are run in place of many: each holds and multiplies the same."""


class Unplanned(UserError):
    """A model that cannot be gone through without data, as a mixture in fp32."""


@dataclass(frozen=True)
class Need:
    """What a phase takes.

    Args:
        peak: bytes that live at most, weights among them.
        flops: floating-point operations of products, of one time that the phase is gone through.
        sizes: how many sizes of products in half precision there are.
        fine: those of `flops` that are not in half precision.
    """

    peak: float
    flops: float
    sizes: float = 0
    fine: float = 0

    @classmethod
    def of(cls, live: Live) -> Need:
        """Return what was counted."""
        return cls(live.peak, live.flops, len(live.sizes), live.fine)

    def __add__(self, other: Need) -> Need:
        return Need(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Need) -> Need:
        return self + other * -1

    def __mul__(self, factor: float) -> Need:
        return Need(*(x * factor for x in astuple(self)))

    def then(self, other: Need) -> Need:
        """Return what it takes to do this, and another thing after it."""
        return replace(self + other, peak=max(self.peak, other.peak))

    def times(self, count: float) -> Need:
        """Return what it takes to go through the phase so many times."""
        return replace(self, flops=self.flops * count, fine=self.fine * count)


def extended(
    config: PreTrainedConfig,
    run: Callable[[PreTrainedConfig], Need],
    short: tuple[int, int] = SHORT,
    layers: Sequence[LayerShape] = (),
) -> Need:
    """Return what a phase takes of a model, by two with fewer layers where it has many.

    Args:
        config: of the whole model.
        run: told a config, goes through the phase.
        short: layers of the two.
        layers: what the config does not list of each layer, such as its experts; none: all alike.

    Raises:
        Unplanned: if its code asks for data.
    """
    count, period = int(config.num_hidden_layers), _until_all_kinds(config, layers)
    few, more = max(short[0], period), max(short[1], 2 * period)
    try:
        if count <= more or hasattr(config, "pruned"):  # whose layers are not alike
            return run(config)
        first, second = run(shortened(config, few)), run(shortened(config, more))
    except RuntimeError as error:  # of torch, which has several kinds for it
        said = str(error).partition("\n")[0]
        raise Unplanned(
            f"a run on {config.model_type} cannot be planned: its code does not go without data "
            f"({said}); pass --dtype bfloat16, or do one with --steps 1: it says what it held"
        ) from error
    return first + (second - first) * ((count - few) / (more - few))


def _until_all_kinds(config: PreTrainedConfig, layers: Sequence[LayerShape]) -> int:
    """Return how many layers from the first there are until each kind was there."""
    types = getattr(config, "layer_types", None) or [""] * max(1, len(layers))
    kinds = [(x, layers[i] if layers else None) for i, x in enumerate(types)]
    return 1 + max(kinds.index(kind) for kind in set(kinds))


def in_batches(run: Callable[[int], Need], count: float) -> Need:
    """Return what a phase takes of many batches, by two that have few."""
    few, more = FEW
    first = run(few)
    return first + (run(more) - first) * max(0.0, (count - few) / (more - few))


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the config of the same model with fewer layers."""
    values = copy.deepcopy(config.to_dict()) | {"num_hidden_layers": layers}
    if isinstance(kinds := values.get("layer_types"), list):
        values["layer_types"] = kinds[:layers]
    return type(config).from_dict(values)
