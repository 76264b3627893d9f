"""What is in a layer besides attention and an MLP, as llama.cpp wants it: experts, convolutions.

Shape suffixes: D hidden width, E experts, O rows (outputs), I columns (inputs), L taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from gguf import MODEL_TENSOR, TENSOR_NAMES
from numpy.typing import NDArray
from torch import Tensor, nn

from nuteprune.model.anatomy import Anatomy
from nuteprune.model.mixture import Mixture

Array = NDArray[np.float32]


def array_of(tensor: Tensor) -> Array:
    """Return a tensor's values."""
    return tensor.detach().to("cpu", torch.float32).numpy()


def name_of(
    tensor: MODEL_TENSOR,
    layer: int | None = None,
    kind: Literal["weight", "bias"] = "weight",
) -> str:
    """Return what a file calls a tensor, of a layer or of none."""
    return f"{TENSOR_NAMES[tensor].format(bid=layer)}.{kind}"


def convolution(anatomy: Anatomy, layer: int) -> Iterator[tuple[str, Array]]:
    """Yield a short convolution's projections, and its taps (D, L)."""
    names = (MODEL_TENSOR.SHORTCONV_INPROJ, MODEL_TENSOR.SHORTCONV_OUTPROJ)
    for tensor, projection in zip(names, anatomy.family.mixer, strict=True):
        linear = anatomy.linear(layer, projection)
        assert linear is not None
        yield name_of(tensor, layer), array_of(linear.weight)
    yield name_of(MODEL_TENSOR.SHORTCONV_CONV, layer), taps_of(anatomy, layer)


def taps_of(anatomy: Anatomy, layer: int) -> Array:
    """Return the taps (D, L) of a layer's short convolution."""
    block = anatomy.layers[layer].get_submodule(anatomy.family.mixer_module)
    (taps,) = (x for x in block.children() if isinstance(x, nn.Conv1d))
    return array_of(taps.weight).squeeze(1)


def experts(
    anatomy: Anatomy, mixture: Mixture, layer: int, factor: float
) -> Iterator[tuple[str, Array]]:
    """Yield a layer's router, stacks (E, O, I) and shared expert."""
    yield name_of(MODEL_TENSOR.FFN_GATE_INP, layer), array_of(mixture.router.weight)
    gated, down = (array_of(mixture.stack(x)) for x in mixture.entry.projections)
    gate, up = np.split(gated, 2, axis=1)
    yield name_of(MODEL_TENSOR.FFN_GATE_EXP, layer), gate
    yield name_of(MODEL_TENSOR.FFN_UP_EXP, layer), up
    yield name_of(MODEL_TENSOR.FFN_DOWN_EXP, layer), down * np.float32(factor)
    roles = (MODEL_TENSOR.FFN_GATE_SHEXP, MODEL_TENSOR.FFN_UP_SHEXP, MODEL_TENSOR.FFN_DOWN_SHEXP)
    for role, projection in zip(roles, mixture.entry.shared, strict=False):
        linear = anatomy.linear(layer, projection)
        assert linear is not None
        yield name_of(role, layer), array_of(linear.weight)
    if mixture.entry.shared_gate:
        weigh: Any = anatomy.layers[layer].get_submodule(mixture.entry.shared_gate)
        yield name_of(MODEL_TENSOR.FFN_GATE_INP_SHEXP, layer), array_of(weigh.weight)[0]
