"""Rows of a GGUF file: zeros for missing blocks, which llama.cpp mishandles, and types' limits."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import gcd
from typing import TYPE_CHECKING

from nuteprune.errors import UserError, some
from nuteprune.model.shape import SUPER_BLOCK, LayerShape, Shape

if TYPE_CHECKING:
    from nuteprune.export.gguf.architectures import Architecture

BLOCK = 32
"""Weights of a row that Q8_0 and Q4_0 quantize together."""


def padded_shape(shape: Shape, arch: Architecture, quantized: bool) -> tuple[Shape, list[str]]:
    """Return the shape to write, with zeros for blocks whose absence llama.cpp mishandles.

    A layer with attention and no MLP would lose its attention, and no MLP in the last layer ends
    the process, so a missing MLP becomes `BLOCK` neurons of zeros, and a missing attention, where
    it cannot be stated, one head. Where rows are quantized, neurons are filled up to whole blocks.

    Args:
        shape: the model's dimensions.
        arch: the architecture to write it as.
        quantized: whether rows must be whole blocks.

    Returns:
        The shape, and a note on each kind of zeros.
    """
    layers = [
        layer if layer.experts else _padded_layer(layer, arch.optional_attention, quantized)
        for layer in shape.layers  # with experts, all are alike, so nothing is missing
    ]
    pairs = list(zip(shape.layers, layers, strict=True))
    counts = {
        "without an MLP got one of zeros": sum(not x.mlp for x in shape.layers),
        "without attention got one head of zeros": sum(x.heads != y.heads for x, y in pairs),
        f"got zeros to make neurons a multiple of {BLOCK}": sum(
            x.mlp and x.neurons != y.neurons for x, y in pairs
        ),
    }
    notes = [f"{n} layer{'s' * (n > 1)} {what}" for what, n in counts.items() if n]
    return Shape(shape.hidden, tuple(layers)), notes


def _padded_layer(layer: LayerShape, optional_attention: bool, quantized: bool) -> LayerShape:
    neurons = layer.neurons or BLOCK
    if quantized:
        neurons = -(-neurons // BLOCK) * BLOCK
    heads = (layer.heads, layer.kv_heads) if layer.attention or optional_attention else (1, 1)
    return LayerShape(*heads, neurons, mixer=layer.mixer)


def _rows(shape: Shape, head_dim: int) -> Iterator[tuple[int, str, str]]:
    """Yield the lengths of rows: how long, which rows are so, and what would make them fit."""
    yield shape.hidden, f"the width is {shape.hidden}", f"prune with --set hidden_multiple={BLOCK}"
    multiples = f"keep heads in multiples of {BLOCK // gcd(BLOCK, head_dim)} (--shape)"
    for i, layer in enumerate(shape.layers):
        features = layer.heads * head_dim
        which = f"layer {i} has {layer.heads} heads of {head_dim}, {features} features"
        yield features, which, multiples
        for neurons in (layer.expert_neurons, layer.neurons):
            which = f"layer {i} has experts of {neurons} neurons"
            yield neurons, which, f"prune with --set neuron_multiple={BLOCK}"


def check_rows(shape: Shape, head_dim: int, type_name: str) -> None:
    """Refuse rows that a quantized type cannot hold: it stores blocks of `BLOCK` weights.

    Args:
        shape: of `padded_shape`: what no expert has is filled up.
        head_dim: features of a head.
        type_name: the type.

    Raises:
        UserError: naming the rows and what would make them fit.
    """
    for size, which, remedy in _rows(shape, head_dim):
        if size % BLOCK:
            raise UserError(
                f"--type {type_name} stores rows in blocks of {BLOCK}, and {which}: pass --type "
                f"f16 or bf16, or {remedy}"
            )


def torn_rows(shape: Shape, head_dim: int) -> list[str]:
    """Return a line on rows that K-quants cannot store whole, none where there are no such rows."""
    odd = sorted({size for size, _, _ in _rows(shape, head_dim) if size % SUPER_BLOCK})
    said = (
        f"K-quants store blocks of {SUPER_BLOCK}, so rows of {some(odd, 6)} would be stored in "
        "other types, larger or coarser"
    )
    return [said] if odd else []


def check_super_blocks(shape: Shape, head_dim: int, kinds: Collection[str]) -> None:
    """Refuse a cut after which K-quants could not store rows: they take blocks of `SUPER_BLOCK`.

    Args:
        shape: of the model before the cut.
        head_dim: features of a head.
        kinds: kinds of gates.

    Raises:
        UserError: naming what is no multiple, and what to do instead.
    """
    weights = f"no multiple of the {SUPER_BLOCK} weights that K-quants store together"
    if shape.hidden % SUPER_BLOCK and "hidden" not in kinds:
        raise UserError(
            f"the width is {shape.hidden}, {weights}, so no cut of other kinds makes its rows fit: "
            "leave for_quantization out and export with --type q8_0 or q4_0, or add hidden to "
            "--gates"
        )
    for layer in filter(lambda x: x.heads, shape.layers):
        for kind, heads in (("heads", 1), ("kv_groups", layer.heads_per_group)):
            if kind in kinds and heads * head_dim % SUPER_BLOCK:
                raise UserError(
                    f"a unit of {kind} has {heads * head_dim} features, {weights}: with "
                    "for_quantization leave it out of --gates, such as --gates neurons"
                )
