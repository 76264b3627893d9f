"""Kernels that a CPU's library makes for each size of a product, and keeps: their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from nuteprune.gates.masks import Layout, Masks
from nuteprune.plan.need import Need

KERNEL = 0.58e6
"""Bytes of the kernel that oneDNN makes on CPUs for each size of a product in half precision, and
keeps: measured, with torch 2.13."""
KERNELS = 1024
"""How many of them it keeps: measured likewise. Those that were not used for longest go."""


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
