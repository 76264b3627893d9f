"""A model's tensors as llama.cpp's architectures want them: split, fused, reordered, filled up.

Shape suffixes: O rows (outputs), I columns (inputs), V vocabulary, D hidden width. Everything is
computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nuteprune.export.gguf.architectures import Architecture
from nuteprune.export.gguf.block_tensors import (
    Array,
    Named,
    expert_tensors,
    latent_attention_tensors,
    mixer_tensors,
    values_of,
)
from nuteprune.export.gguf.refusals import ModelFacts
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Projection
from nuteprune.model.shape import LayerShape, Shape, axis_sizes


@dataclass
class LinearMap:
    """A linear map, such as the queries of a layer, whatever module it came from."""

    weight_OI: Array
    bias_O: Array | None = None

    def each(self, change: Callable[[Array], Array]) -> LinearMap:
        """Return the map with its weight and its bias changed in the same way."""
        bias_O = None if self.bias_O is None else change(self.bias_O)
        return LinearMap(change(self.weight_OI), bias_O)

    def scaled(self, factor: float) -> LinearMap:
        """Return the map with its output multiplied."""
        return self if factor == 1.0 else self.each(lambda x: x * np.float32(factor))

    def rows(self, order_O: NDArray[np.int64]) -> LinearMap:
        """Return the map with only these outputs, in this order."""
        return self.each(lambda x: x[order_O])

    def padded(self, outputs: int, inputs: int) -> LinearMap:
        """Return the map with zero rows and columns added at the end."""
        rows, columns = outputs - len(self.weight_OI), inputs - self.weight_OI.shape[1]
        if not rows and not columns:
            return self
        bias_O = None if self.bias_O is None else np.pad(self.bias_O, (0, rows))
        return LinearMap(np.pad(self.weight_OI, ((0, rows), (0, columns))), bias_O)


Maps = dict[str, LinearMap]
"""Role, such as `q` or `down` -> the map."""
_NAMES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "qkv": "attn_qkv", "o": "attn_output"} | {
    role: f"ffn_{role}" for role in ("gate", "up", "down")
}
"""Role of a map -> what files call it."""


def all_tensors(anatomy: Anatomy, arch: Architecture, facts: ModelFacts, target: Shape) -> Named:
    """Yield every tensor of a GGUF file, name and float32 values, in the file's order.

    Args:
        anatomy: the model.
        arch: the architecture to write it as.
        facts: of the model, by which the architecture was chosen.
        target: the shape to write, of `rows.padded_shape`.
    """
    embedding, divisor, factors = _folded_factors(anatomy, arch)
    yield "token_embd.weight", values_of(anatomy.embedding.weight) * np.float32(embedding)
    is_embedding = anatomy.tied and embedding == divisor == 1
    if arch.head == "always" or (arch.head == "optional" and not is_embedding):
        yield "output.weight", values_of(anatomy.head.weight) / np.float32(divisor)
        if getattr(anatomy.head, "bias", None) is not None:
            yield "output.bias", values_of(anatomy.head.bias)
    for name, values in _norm_tensors(anatomy, "output_norm", anatomy.final_norm):
        yield arch.renamed.get(name, name), values
    yield from _rope_tensors(facts)
    for i, want in enumerate(target.layers):
        for name, values in _layer_tensors(anatomy, arch, i, want, factors):
            yield f"blk.{i}.{arch.renamed.get(name, name)}", values


def _layer_tensors(
    anatomy: Anatomy, arch: Architecture, layer: int, want: LayerShape, factors: dict[str, float]
) -> Named:
    have, family, factors = anatomy.shape.layers[layer], anatomy.family, dict(factors)
    yield from _block_norms(anatomy, layer, want)
    if family.latent:
        yield from latent_attention_tensors(anatomy, layer)
    elif have.attention:
        factors["q"] = arch.folded_in("q", anatomy.config)
        if not arch.multipliers:
            ours = arch.attention_scale(anatomy.shape, anatomy.head_dim)
            factors["q"] *= anatomy.attention_scale(layer) / ours
        weighted = (x for x in anatomy.qk_norms(layer) if getattr(x, "weight", None) is not None)
        for role, norm in zip(("q", "k"), weighted, strict=False):
            # A factor on queries belongs behind their norm.
            factor = factors.pop("q") if role == "q" else 1.0
            yield from _norm_tensors(anatomy, f"attn_{role}_norm", norm, factor)
        for path in family.per_head:
            yield "attn_sinks.weight", values_of(anatomy.layers[layer].get_parameter(path))
    elif want.attention and family.qk_norms:  # of a head of zeros
        for role in ("q", "k"):
            yield f"attn_{role}_norm.weight", np.ones(anatomy.head_dim, np.float32)
    for role, linear in _maps(anatomy, arch, layer, want, factors).items():
        yield f"{_NAMES[role]}.weight", linear.weight_OI
        if linear.bias_O is not None:
            yield f"{_NAMES[role]}.bias", linear.bias_O
    if have.mixer:
        yield from mixer_tensors(anatomy, arch, layer)
    if (mixture := anatomy.mixture(layer)) is not None:
        yield from expert_tensors(anatomy, mixture, layer, factors.get("down", 1.0))


def _folded_factors(anatomy: Anatomy, arch: Architecture) -> tuple[float, float, dict[str, float]]:
    """Return what is folded in: (embedding factor, logit divisor, factor by role)."""
    if arch.folded:
        each = {role: arch.folded_in(role, anatomy.config) for role in arch.folded}
        return each.pop("embedding"), anatomy.logit_scale()[0], each
    if arch.multipliers or anatomy.family.multipliers is None:
        return 1.0, 1.0, {}
    embedding, residual = (float(getattr(anatomy.config, x)) for x in anatomy.family.multipliers)
    return embedding, anatomy.logit_scale()[0], {"o": residual, "down": residual}


def _norm_tensors(anatomy: Anatomy, name: str, norm: Any, factor: float = 1.0) -> Named:
    """Yield a norm's tensors; llama.cpp multiplies by w where some classes do by 1 + w."""
    if getattr(norm, "weight", None) is None:
        return
    offset = np.float32(anatomy.family.norm.endswith("_1p"))
    yield f"{name}.weight", (values_of(norm.weight) + offset) * np.float32(factor)
    if getattr(norm, "bias", None) is not None:
        yield f"{name}.bias", values_of(norm.bias) * np.float32(factor)


def _block_norms(anatomy: Anatomy, layer: int, want: LayerShape) -> Named:
    """Yield the norms of what blocks read and write."""
    family = anatomy.family
    reads_norms = {*family.norms} - {*(family.post_norms or ())}  # else the stream as it is
    for block, name, is_written in (
        ("attn_block", "attn_norm", want.attention),
        ("mlp_block", "ffn_norm", want.mlp),
    ):
        if not reads_norms or (block == "mlp_block" and family.shared_norms):
            continue
        norm = anatomy.pre_norm(layer, block)
        if norm is None and is_written:  # what it feeds is zero
            yield f"{name}.weight", np.ones(anatomy.shape.hidden, np.float32)
        yield from _norm_tensors(anatomy, name, norm)
    for block, name in (("attn_block", "post_attention_norm"), ("mlp_block", "post_ffw_norm")):
        yield from _norm_tensors(anatomy, name, anatomy.post_norm(layer, block))


def _rope_tensors(facts: ModelFacts) -> Named:
    """Yield divisors of the rotary frequencies, for the kinds that llama.cpp reads as tensors."""
    rope, head_dim = facts.rope, facts.head_dim
    if rope.get("rope_type") == "llama3":
        scaled = ROPE_INIT_FUNCTIONS["llama3"](facts.config, torch.device("cpu"))[0]
        steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        yield "rope_freqs.weight", values_of(rope["rope_theta"] ** -steps / scaled)
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            yield f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32)


def _maps(
    anatomy: Anatomy, arch: Architecture, layer: int, want: LayerShape, factors: dict[str, float]
) -> Maps:
    """Return a layer's maps as the architecture has them, zero where the model has nothing.

    Experts, latent attention and mixers are none of them.
    """
    family, found = anatomy.family, Maps()
    if want.attention and not family.latent:
        parts = [x for p in family.attention for x in _unstacked(anatomy, layer, p, want)]
        found |= zip(("q", "k", "v", "o"), parts, strict=True)
    if not want.experts:
        parts = [x for p in family.mlp for x in _unstacked(anatomy, layer, p, want)]
        found |= zip(("gate", "up", "down")[-len(parts) :], parts, strict=True)
    found = {role: x.scaled(factors.get(role, 1.0)) for role, x in found.items()}
    if arch.interleaved_rope and family.rope_pairs == "halves" and "q" in found:
        for role in ("q", "k"):
            found[role] = found[role].rows(_neighbours(found[role], anatomy.head_dim))
    if arch.fused_qkv and "q" in found:
        found["qkv"] = _stacked([found.pop(role) for role in ("q", "k", "v")])
    if arch.fused_gate:
        found["up"] = _stacked([found.pop("gate"), found["up"]])
    return found


def _unstacked(
    anatomy: Anatomy, layer: int, projection: Projection, want: LayerShape
) -> list[LinearMap]:
    """Return the maps that a module stacks, in the order of its axes, filled up with zeros."""
    linear, head_dim = anatomy.linear(layer, projection), anatomy.head_dim
    have, filled = (
        axis_sizes(x, head_dim) | {"hidden": anatomy.shape.hidden}
        for x in (anatomy.shape.layers[layer], want)
    )
    axes = ("q",) * 3 if projection.rows == ("qkv",) else projection.rows
    if linear is None:
        parts = [LinearMap(np.zeros((0, 0), np.float32))] * len(axes)
    else:
        bias_O = None if linear.bias is None else values_of(linear.bias)
        order_O = np.arange(linear.out_features)
        if projection.rows == ("qkv",):
            order_O = order_O.reshape(-1, 3, head_dim).swapaxes(0, 1).reshape(-1)
        ends = np.cumsum([have[axis] for axis in axes])[:-1]
        stacked = LinearMap(values_of(linear.weight), bias_O)
        parts = [stacked.rows(x) for x in np.split(order_O, ends)]
    inputs = filled[projection.columns]
    return [x.padded(filled[axis], inputs) for axis, x in zip(axes, parts, strict=True)]


def _stacked(maps: list[LinearMap]) -> LinearMap:
    biases = [x.bias_O for x in maps if x.bias_O is not None]
    weight_OI = np.concatenate([x.weight_OI for x in maps])
    return LinearMap(weight_OI, np.concatenate(biases) if biases else None)


def _neighbours(linear: LinearMap, head_dim: int) -> NDArray[np.int64]:
    """Return the row order that puts features that rotate together side by side."""
    rows = np.arange(len(linear.weight_OI)).reshape(-1, 2, head_dim // 2)
    return rows.transpose(0, 2, 1).reshape(-1)
