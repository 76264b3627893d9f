"""A model's tensors as llama.cpp's architectures want them: split, fused, reordered, filled up.

Shape suffixes: O rows (outputs), I columns (inputs), V vocabulary, D hidden width. Everything is
computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import MODEL_TENSOR, TENSOR_NAMES
from numpy.typing import NDArray
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nuteprune.export.gguf_arch import Arch
from nuteprune.export.gguf_blocks import (
    Array,
    array_of,
    experts,
    latent_attention,
    mixer,
    name_of,
    sinks,
)
from nuteprune.export.gguf_fit import Source
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Projection
from nuteprune.model.shape import LayerShape, Shape, axis_sizes

Parts = dict[str, "Part"]
_LAYER_NORMS = (
    ("pre_norm", "attn_block", MODEL_TENSOR.ATTN_NORM),
    ("pre_norm", "mlp_block", MODEL_TENSOR.FFN_NORM),
    ("post_norm", "attn_block", MODEL_TENSOR.ATTN_POST_NORM),
    ("post_norm", "mlp_block", MODEL_TENSOR.FFN_POST_NORM),
)
_PROJECTIONS = {
    "q": MODEL_TENSOR.ATTN_Q,
    "k": MODEL_TENSOR.ATTN_K,
    "v": MODEL_TENSOR.ATTN_V,
    "qkv": MODEL_TENSOR.ATTN_QKV,
    "o": MODEL_TENSOR.ATTN_OUT,
    "gate": MODEL_TENSOR.FFN_GATE,
    "up": MODEL_TENSOR.FFN_UP,
    "down": MODEL_TENSOR.FFN_DOWN,
}


@dataclass
class Part:
    """A linear map, such as the queries of a layer, whatever module it came from."""

    weight_OI: Array
    bias_O: Array | None = None

    def scaled(self, factor: float) -> Part:
        """Return the map with its output multiplied."""
        if factor == 1.0:
            return self
        bias_O = None if self.bias_O is None else self.bias_O * np.float32(factor)
        return Part(self.weight_OI * np.float32(factor), bias_O)

    def rows(self, order_O: NDArray[np.int64]) -> Part:
        """Return the map with its outputs reordered."""
        return Part(self.weight_OI[order_O], None if self.bias_O is None else self.bias_O[order_O])

    def filled(self, outputs: int, inputs: int) -> Part:
        """Return the map with zero rows and columns added at the end."""
        rows, columns = outputs - len(self.weight_OI), inputs - self.weight_OI.shape[1]
        if not rows and not columns:
            return self
        bias_O = None if self.bias_O is None else np.pad(self.bias_O, (0, rows))
        return Part(np.pad(self.weight_OI, ((0, rows), (0, columns))), bias_O)


def tensors(
    anatomy: Anatomy, arch: Arch, source: Source, target: Shape
) -> Iterator[tuple[str, Array]]:
    """Yield every tensor of a GGUF file, name and float32 values, in the file's order.

    Args:
        anatomy: the model.
        arch: what it is written as.
        source: what was declared when the architecture was chosen.
        target: `gguf_rows.mended`'s shape.
    """
    embedding, divisor, factors = _factors(anatomy, arch)
    embedding_VD = array_of(anatomy.embedding.weight)
    yield name_of(MODEL_TENSOR.TOKEN_EMBD), embedding_VD * np.float32(embedding)
    same = anatomy.tied and embedding == divisor == 1
    if arch.head == "always" or (arch.head == "optional" and not same):
        yield name_of(MODEL_TENSOR.OUTPUT), array_of(anatomy.head.weight) / np.float32(divisor)
        if getattr(anatomy.head, "bias", None) is not None:
            yield name_of(MODEL_TENSOR.OUTPUT, kind="bias"), array_of(anatomy.head.bias)
    yield from _norm(anatomy, _called(arch.final_norm), anatomy.final_norm)
    yield from _rope(source)
    for i, (have, want) in enumerate(zip(anatomy.shape.layers, target.layers, strict=True)):
        yield from _norms(anatomy, arch, i, want)
        parts = _attention(anatomy, i, have) | ({} if have.experts else _mlp(anatomy, i, have))
        if anatomy.family.latent:
            yield from latent_attention(anatomy, i)
        elif have.attention:
            factors["q"] = arch.folded_in("q", anatomy.config)
            if not arch.multipliers:
                factors["q"] *= anatomy.attention_scale(i) / arch.attention_scale(
                    source.shape, anatomy.head_dim
                )
            yield from _qk_norms(anatomy, i, factors)
            yield from sinks(anatomy, i)
        elif want.attention:
            yield from _unit_qk_norms(anatomy, i)
        parts = {role: part.scaled(factors.get(role, 1.0)) for role, part in parts.items()}
        parts = _filled(parts, want, target.hidden, anatomy)
        if arch.interleaved_rope and anatomy.family.rope_pairs == "halves":
            parts = _reordered(parts, want, anatomy.head_dim)
        yield from _layer(i, _fused(parts, arch))
        if have.mixer:
            yield from mixer(anatomy, arch, i)
        if (mixture := anatomy.mixture(i)) is not None:
            yield from experts(anatomy, mixture, i, factors.get("down", 1.0))


def _called(name: str) -> MODEL_TENSOR:
    """Return the tensor that files call so, but for a layer's number."""
    return next(x for x, full in TENSOR_NAMES.items() if full.rpartition(".")[2] == name)


def _factors(anatomy: Anatomy, arch: Arch) -> tuple[float, float, dict[str, float]]:
    """Return what is folded in: (embedding factor, logit divisor, factor by role)."""
    if arch.folded:
        each = {role: arch.folded_in(role, anatomy.config) for role in arch.folded}
        return each.pop("embedding"), anatomy.logit_scale()[0], each
    if arch.multipliers or anatomy.family.multipliers is None:
        return 1.0, 1.0, {}
    embedding, residual = (float(getattr(anatomy.config, x)) for x in anatomy.family.multipliers)
    return embedding, anatomy.logit_scale()[0], {"o": residual, "down": residual}


def _norm(
    anatomy: Anatomy, tensor: MODEL_TENSOR, norm: Any, layer: int | None = None, factor: float = 1.0
) -> Iterator[tuple[str, Array]]:
    """Yield a norm's tensors; llama.cpp multiplies by w where some classes do by 1 + w."""
    if getattr(norm, "weight", None) is None:
        return
    offset = np.float32(anatomy.family.norm.endswith("_1p"))
    yield name_of(tensor, layer), (array_of(norm.weight) + offset) * np.float32(factor)
    if getattr(norm, "bias", None) is not None:
        yield name_of(tensor, layer, "bias"), array_of(norm.bias) * np.float32(factor)


def _norms(
    anatomy: Anatomy, arch: Arch, layer: int, want: LayerShape
) -> Iterator[tuple[str, Array]]:
    written = {"attn_block": want.attention, "mlp_block": want.mlp}
    for kind, block, tensor in _LAYER_NORMS:
        if kind == "pre_norm" and (not arch.pre_norms or (arch.one_norm and block == "mlp_block")):
            continue
        if kind == "pre_norm" and block == "mlp_block":
            tensor = _called(arch.mlp_norm)
        norm: nn.Module | None = getattr(anatomy, kind)(layer, block)
        if norm is not None:
            bare = arch.bare_mlp_norm and block == "mlp_block"
            for name, values in _norm(anatomy, tensor, norm, layer):
                yield name.removesuffix(".weight") if bare else name, values
        elif kind == "pre_norm" and written[block]:  # what it feeds is zero
            yield name_of(tensor, layer), np.ones(anatomy.shape.hidden, np.float32)


def _qk_norms(
    anatomy: Anatomy, layer: int, factors: dict[str, float]
) -> Iterator[tuple[str, Array]]:
    """Yield the norms of queries and keys; a factor on queries belongs behind their norm."""
    names = (MODEL_TENSOR.ATTN_Q_NORM, MODEL_TENSOR.ATTN_K_NORM)
    weighted = (x for x in anatomy.qk_norms(layer) if getattr(x, "weight", None) is not None)
    for tensor, norm in zip(names, weighted, strict=False):
        factor = factors.pop("q") if tensor == MODEL_TENSOR.ATTN_Q_NORM else 1.0
        yield from _norm(anatomy, tensor, norm, layer, factor)


def _unit_qk_norms(anatomy: Anatomy, layer: int) -> Iterator[tuple[str, Array]]:
    if anatomy.family.qk_norms:
        for tensor in (MODEL_TENSOR.ATTN_Q_NORM, MODEL_TENSOR.ATTN_K_NORM):
            yield name_of(tensor, layer), np.ones(anatomy.head_dim, np.float32)


def _rope(source: Source) -> Iterator[tuple[str, Array]]:
    """Yield divisors of the rotary frequencies, for the kinds that llama.cpp reads as tensors."""
    rope = source.rope
    if rope.get("rope_type") == "llama3":
        scaled = ROPE_INIT_FUNCTIONS["llama3"](source.config, torch.device("cpu"))[0]
        steps = torch.arange(0, source.head_dim, 2, dtype=torch.float64) / source.head_dim
        yield name_of(MODEL_TENSOR.ROPE_FREQS), array_of(rope["rope_theta"] ** -steps / scaled)
    if rope.get("rope_type") == "longrope":
        for tensor, key in (
            (MODEL_TENSOR.ROPE_FACTORS_LONG, "long_factor"),
            (MODEL_TENSOR.ROPE_FACTORS_SHORT, "short_factor"),
        ):
            yield name_of(tensor), np.array(rope[key], np.float32)


def _attention(anatomy: Anatomy, layer: int, shape: LayerShape) -> Parts:
    """Return a layer's queries, keys, values and output; nothing if it has no attention."""
    if not shape.attention or anatomy.family.latent:
        return {}
    *reads, writes = anatomy.family.attention
    parts = [x for p in reads for x in _unstacked(anatomy, layer, p, shape)]
    parts += _unstacked(anatomy, layer, writes, shape)
    return dict(zip(("q", "k", "v", "o"), parts, strict=True))


def _mlp(anatomy: Anatomy, layer: int, shape: LayerShape) -> Parts:
    """Return a layer's gate (where it has one), up and down; nothing if it has no MLP."""
    if not shape.mlp:
        return {}
    parts = [x for p in anatomy.family.mlp for x in _unstacked(anatomy, layer, p, shape)]
    return dict(zip(("gate", "up", "down")[-len(parts) :], parts, strict=True))


def _unstacked(
    anatomy: Anatomy, layer: int, projection: Projection, shape: LayerShape
) -> list[Part]:
    """Return the maps that a module stacks, in the order of its axes."""
    linear = anatomy.linear(layer, projection)
    assert linear is not None
    whole = Part(array_of(linear.weight), None if linear.bias is None else array_of(linear.bias))
    if projection.rows == ("qkv",):
        rows = np.arange(linear.out_features).reshape(shape.heads, 3, anatomy.head_dim)
        return [whole.rows(rows[:, j].reshape(-1)) for j in range(3)]
    if projection.rows == ("hidden",):
        return [whole]
    sizes = axis_sizes(shape, anatomy.head_dim)
    found, start = [], 0
    for axis in projection.rows:
        found.append(whole.rows(np.arange(start, start + sizes[axis])))
        start += sizes[axis]
    return found


def _filled(parts: Parts, want: LayerShape, hidden: int, anatomy: Anatomy) -> Parts:
    """Return the parts at the size that is written, zero where the model has nothing."""
    head_dim = anatomy.head_dim
    sizes: dict[str, tuple[int, int]] = {}
    if want.attention and not anatomy.family.latent:
        q, kv = want.heads * head_dim, want.kv_heads * head_dim
        gated = anatomy.family.attention[0].rows == ("qgate",)
        sizes |= {
            "q": (q * (1 + gated), hidden),
            "k": (kv, hidden),
            "v": (kv, hidden),
            "o": (hidden, q),
        }
    if not want.experts:
        two = sum(len(p.rows) for p in anatomy.family.mlp[:-1]) > 1
        sizes |= {"gate": (want.neurons, hidden)} if two else {}
        sizes |= {"up": (want.neurons, hidden), "down": (hidden, want.neurons)}
    empty = Part(np.zeros((0, 0), np.float32))
    return {role: parts.get(role, empty).filled(*size) for role, size in sizes.items()}


def _reordered(parts: Parts, shape: LayerShape, head_dim: int) -> Parts:
    """Return the parts with the rows of queries and keys where pairs are neighbours."""
    if "q" not in parts:
        return parts
    q, k = (
        parts[role].rows(_interleaved(count, head_dim))
        for role, count in (("q", shape.heads), ("k", shape.kv_heads))
    )
    return {**parts, "q": q, "k": k}


def _fused(parts: Parts, arch: Arch) -> Parts:
    """Return the parts as the architecture stacks them."""
    parts = dict(parts)
    if arch.fused_qkv and "q" in parts:
        parts["qkv"] = _stacked([parts.pop(role) for role in ("q", "k", "v")])
    if arch.fused_gate:
        parts["up"] = _stacked([parts.pop("gate"), parts["up"]])
    return parts


def _stacked(parts: list[Part]) -> Part:
    biases = [part.bias_O for part in parts if part.bias_O is not None]
    return Part(
        np.concatenate([part.weight_OI for part in parts]),
        np.concatenate(biases) if biases else None,
    )


def _interleaved(heads: int, head_dim: int) -> NDArray[np.int64]:
    """Return the order of rows in which the halves that rotate together are neighbours."""
    rows = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
    return rows.transpose(0, 2, 1).reshape(-1)


def _layer(layer: int, parts: Parts) -> Iterator[tuple[str, Array]]:
    for role, part in parts.items():
        yield name_of(_PROJECTIONS[role], layer), part.weight_OI
        if part.bias_O is not None:
            yield name_of(_PROJECTIONS[role], layer, "bias"), part.bias_O
