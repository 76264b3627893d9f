"""What a run needs: bytes of a model's parts, and what stages take, extrapolated from few layers.

A decoder's layers are alike, so each adds the same; and so does each batch. Kernels are not alike:
a CPU's library makes one for each size of a product, and keeps it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import PreTrainedConfig

from nuteprune.data.decoding import fitting, most_cached
from nuteprune.errors import UserError
from nuteprune.gates.budget import Budget
from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.shape import LayerShape
from nuteprune.plan.live import Live
from nuteprune.train.config import NutePruneConfig

SHORT = (2, 4)
"""Layers of the models that are run in place of a long one."""
ONE_BY_ONE = (1, 2)
"""The same for stages that go through a model layer by layer."""
PARTS_OF_LAYERS = (1, 2, 3)
"""The same for stages that cut single units: each trial runs all layers from the unit's on, so work
grows with the square."""

KERNEL = 0.58e6
"""Bytes of the kernel that oneDNN makes on CPUs for each size of a product in half precision, and
keeps: measured, with torch 2.13."""
KERNELS = 1024
"""How many of them it keeps: measured likewise. Those that were not used for longest go."""


MOVED = ("summed", "gathered", "passed")
"""What `Need.moved` may have."""


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
        moved: bytes that several processes send each other; see `plan.live.Live`.
    """

    peaks: tuple[float, ...]
    flops: float = 0.0
    fine: float = 0.0
    sizes: float = 0.0
    moved: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, live: Live, peaks: Sequence[float] = ()) -> Need:
        """Return the counted need, in stretches with these peaks, or in one."""
        whole = (max([live.peak, *live.ticks]),)
        return cls(tuple(peaks) or whole, live.flops, live.fine, len(live.sizes), dict(live.moved))

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
        moved = {k: self.moved.get(k, 0) + other.moved.get(k, 0) for k in MOVED}
        return Need(self.peaks + other.peaks, *sums, moved)

    def times(self, count: float) -> Need:
        """Return the need of this many passes."""
        moved = {k: x * count for k, x in self.moved.items()}
        return replace(self, flops=self.flops * count, fine=self.fine * count, moved=moved)

    def sent(self, devices: int, sharded: bool) -> float:
        """Return the bytes that each of several devices sends, each having its share of the text.

        Args:
            devices: how many there are.
            sharded: whether they share the weights out; else each has them whole.
        """
        found = 2 * self.moved.get("summed", 0)
        if sharded:
            found += self.moved.get("gathered", 0) + self.moved.get("passed", 0) / devices
        return found * (devices - 1) / devices


def through(found: Sequence[tuple[float, Need]], at: float) -> Need:
    """Extrapolate needs to a place: work from all others, peaks from the last ones.

    Args:
        found: places, growing, and the needs there.
        at: the place.
    """
    places, needs = zip(*found, strict=True)

    def extrapolated(values: Sequence[float], last: int) -> float:
        curve = np.polyfit(places[-last:], values[-last:], last - 1)
        return float(np.polyval(curve, at))

    return Need(
        tuple(extrapolated(x, 2) for x in zip(*(x.peaks for x in needs), strict=True)),
        extrapolated([x.flops for x in needs], len(needs)),
        extrapolated([x.fine for x in needs], len(needs)),
        extrapolated([x.sizes for x in needs], 2),
        {k: extrapolated([x.moved.get(k, 0) for x in needs], len(needs)) for k in MOVED},
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
    if count <= few[-1]:
        return run(count)
    found = [(x, run(x)) for x in few]
    # More batches bring no products of new sizes.
    return replace(through(found, count), sizes=max(need.sizes for _, need in found))


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the config of the same model with fewer layers."""
    values = copy.deepcopy(config.to_dict()) | {"num_hidden_layers": layers}
    if isinstance(kinds := values.get("layer_types"), list):
        values["layer_types"] = kinds[:layers]
    return type(config).from_dict(values)


def on_cpu(phases: Mapping[str, Need]) -> dict[str, float]:
    """Return the bytes that phases of a run on a CPU hold at most.

    Kernels add to live tensors: those of all phases so far.

    Args:
        phases: what each takes, in their order.
    """
    found, sizes = {}, 0.0
    for name, need in phases.items():
        sizes += need.sizes
        found[name] = need.peak + min(sizes, KERNELS) * KERNEL
    return found


def of_all_widths(several: Sequence[Masks]) -> Masks | None:
    """Return masks of a model of few layers whose blocks have all widths of many layers.

    Args:
        several: masks of one model.

    Returns:
        The first layers of any of these in which a block has a width that none before it has; None
        if the model's layers are not alike.
    """
    last, shape = several[-1], several[-1].layout.shape
    seen: set[tuple[str, int]] = set()
    found: list[tuple[Masks, int]] = []
    if len(set(shape.layers)) > 1:
        return None
    for masks in several:
        for i in range(len(shape.layers)):
            inputs = masks.inputs(i).items()
            widths = {(block, int((x > 0).sum())) for block, x in inputs if x is not None}
            if not widths <= seen or not found:
                seen |= widths
                found.append((masks, i))
    values = dict(last.values)  # the hidden width's, which is of no layer
    for kind in values.keys() - {"hidden"}:
        sizes = last.layout.sizes[kind]
        values[kind] = torch.cat([masks.values[kind].split(sizes)[i] for masks, i in found])
    few = replace(shape, layers=shape.layers[: len(found)])
    return Masks(Layout(few, last.layout.head_dim), values)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts, in the dtype of the run.

    Args:
        weights: all, tied ones once.
        projections: the decoder layers' projections.
        layer: of one decoder layer, the largest.
        outside: of what is in no layer: embedding, head, final norm.
        refitted: weights that the refit adds beside the base's, at most.
        adapters: LoRA, in fp32.
        cached: keys and values while the model writes.
        together: how many texts it writes at a time, at most.
        read: weights that a token reads, without the embedding.
    """

    weights: int
    projections: int
    layer: int
    outside: int
    refitted: int
    adapters: int
    cached: int
    together: int
    read: int

    @property
    def layers(self) -> int:
        """Bytes of the decoder layers."""
        return self.weights - self.outside

    @classmethod
    def of(
        cls, anatomy: Anatomy, args: NutePruneConfig, length: int, kinds: Collection[str]
    ) -> Sizes:
        """Read the sizes off a model, whose tensors may be without data.

        Args:
            anatomy: the model.
            args: the run's settings.
            length: tokens per block.
            kinds: of gates.
        """
        each = anatomy.model.dtype.itemsize
        layers = [sum(p.numel() for p in layer.parameters()) for layer in anatomy.layers]
        last, adapters = 0, 0
        for i in range(len(anatomy.layers)):
            ends = {projection.path for projection in anatomy.ends(i).values()}
            for path in anatomy.family.adapted:
                module = anatomy.without_lora(i, path)
                if module is not None:
                    adapters += args.lora_rank * sum(module.weight.shape)
                    last += module.weight.numel() * (path in ends)
            if "expert_neurons" in kinds and (mixture := anatomy.mixture(i)) is not None:
                last += mixture.stack(mixture.down).numel() * (not mixture.entry.weighed_first)
        total = anatomy.parameters()
        table = 0 if anatomy.tied else anatomy.embedding.weight.numel()
        return cls(
            weights=total * each,
            projections=Budget.of(anatomy).before * each,
            layer=max(layers) * each,
            outside=(total - sum(layers)) * each,
            refitted=last * each,
            adapters=adapters * 4,
            cached=most_cached(anatomy.model, length),
            together=fitting(anatomy.model, length),
            read=(total - table) * each,
        )
