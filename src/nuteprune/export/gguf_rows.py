"""Rows of a GGUF file: zeros where llama.cpp goes wrong on nothing, and what types can store."""

from __future__ import annotations

from collections.abc import Collection
from math import gcd

from nuteprune.errors import UserError
from nuteprune.export.gguf_arch import BLOCK, SUPER_BLOCK, Arch
from nuteprune.model.shape import LayerShape, Shape


def mended(shape: Shape, arch: Arch, quantized: bool) -> tuple[Shape, list[str]]:
    """Return the shape to write: with zeros where llama.cpp would go wrong on nothing.

    A layer with attention and no MLP would lose its attention, and no MLP in the last layer ends
    the process, so a missing MLP becomes `BLOCK` neurons of zeros, and a missing attention, where
    it cannot be stated, one head. Where rows are quantized, neurons are filled up to whole blocks.

    Args:
        shape: the model's dimensions.
        arch: what it is written as.
        quantized: whether rows must be whole blocks.

    Returns:
        The shape, and a line about each kind of zeros.
    """
    layers, notes = list(shape.layers), []
    for i, layer in enumerate(layers):
        if layer.experts:  # alike in all layers, so nothing is missing
            continue
        heads = layer.attention or arch.optional_attention
        neurons = layer.neurons or BLOCK
        if quantized:
            neurons = -(-neurons // BLOCK) * BLOCK
        counts = (layer.heads if heads else 1, layer.kv_heads if heads else 1)
        layers[i] = LayerShape(*counts, neurons, mixer=layer.mixer)
    for what, count in (
        ("without an MLP got one of zeros", sum(not x.mlp for x in shape.layers)),
        (
            "without attention got one head of zeros",
            sum(x.heads != y.heads for x, y in zip(layers, shape.layers, strict=True)),
        ),
        (
            f"got zeros to make neurons a multiple of {BLOCK}",
            sum(
                x.mlp and x.neurons != y.neurons for x, y in zip(shape.layers, layers, strict=True)
            ),
        ),
    ):
        if count:
            notes.append(f"{count} layer{'s' if count > 1 else ''} {what}")
    return Shape(shape.hidden, tuple(layers)), notes


def check_rows(shape: Shape, head_dim: int, type_name: str) -> None:
    """Refuse rows that a quantized type cannot hold: it stores blocks of `BLOCK` weights.

    Raises:
        UserError: naming the rows and what would make them fit.
    """
    instead = "pass --type f16 or bf16"
    if shape.hidden % BLOCK:
        raise UserError(
            f"--type {type_name} stores rows in blocks of {BLOCK}, and the width is "
            f"{shape.hidden}: {instead}, or prune with --set hidden_multiple={BLOCK}"
        )
    for i, layer in enumerate(shape.layers):
        if layer.heads * head_dim % BLOCK:
            raise UserError(
                f"--type {type_name} stores rows in blocks of {BLOCK}, and layer {i} has "
                f"{layer.heads} heads of {head_dim}, {layer.heads * head_dim} features: {instead}, "
                f"or keep heads in multiples of {BLOCK // gcd(BLOCK, head_dim)} (--shape)"
            )
        inner = [x for x in (layer.expert_neurons, layer.experts and layer.neurons) if x % BLOCK]
        if inner:
            raise UserError(
                f"--type {type_name} stores rows in blocks of {BLOCK}, and layer {i} has experts "
                f"of {inner[0]} neurons: {instead}, or prune with --set neuron_multiple={BLOCK}"
            )


def torn_rows(shape: Shape, head_dim: int) -> list[str]:
    """Return a line on rows that K-quants cannot store whole, none where there are no such rows."""
    counts = ((x.neurons, x.expert_neurons, x.heads * head_dim) for x in shape.layers)
    rows = {shape.hidden, *(count for layer in counts for count in layer)}
    odd = sorted(x for x in rows if x % SUPER_BLOCK)
    more = f" and {len(odd) - 6} more" * (len(odd) > 6)
    return [
        f"K-quants store blocks of {SUPER_BLOCK}, so rows of {', '.join(map(str, odd[:6]))}{more} "
        "would be stored in other types, larger or coarser"
    ][: len(odd)]


def check_super_blocks(shape: Shape, head_dim: int, kinds: Collection[str]) -> None:
    """Refuse a cut after which K-quants could not store rows: they take blocks of `SUPER_BLOCK`.

    Args:
        shape: of the model before the cut.
        head_dim: features of a head.
        kinds: kinds of gates.

    Raises:
        UserError: naming what is no multiple, and what to do instead.
    """
    if shape.hidden % SUPER_BLOCK and "hidden" not in kinds:
        raise UserError(
            f"the width is {shape.hidden}, no multiple of the {SUPER_BLOCK} weights that K-quants "
            "store together, so no cut of other kinds makes its rows fit: leave "
            "--for-quantization out and export with --type q8_0 or q4_0, or add hidden to --gates"
        )
    for layer in filter(lambda x: x.heads, shape.layers):
        for kind, heads in (("heads", 1), ("kv_groups", layer.heads_per_group)):
            if kind in kinds and heads * head_dim % SUPER_BLOCK:
                raise UserError(
                    f"a unit of {kind} has {heads * head_dim} features, no multiple of the "
                    f"{SUPER_BLOCK} weights that K-quants store together: with --for-quantization "
                    "leave it out of --gates, such as --gates neurons"
                )
