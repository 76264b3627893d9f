"""What is in a layer besides plain attention and an MLP, as llama.cpp wants it.

Experts, latent attention, and what mixes tokens otherwise: convolutions and delta rules.

Shape suffixes: D hidden width, E experts, O rows (outputs), I columns (inputs), L taps, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from gguf import MODEL_TENSOR, TENSOR_NAMES
from numpy.typing import NDArray
from torch import Tensor, nn

from nuteprune.export.gguf_arch import Arch
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Projection
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


def mixer(anatomy: Anatomy, arch: Arch, layer: int) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of what mixes a layer's tokens otherwise than attention."""
    if arch.mixer == "convolution":
        yield from convolution(anatomy, layer)
    elif arch.mixer == "mamba2":
        yield from mamba2(anatomy, arch, layer)
    else:
        yield from delta_net(anatomy, layer, tiled=arch.mixer == "tiled_delta_net")


def convolution(anatomy: Anatomy, layer: int) -> Iterator[tuple[str, Array]]:
    """Yield a short convolution's projections, and its taps (D, L)."""
    names = (MODEL_TENSOR.SHORTCONV_INPROJ, MODEL_TENSOR.SHORTCONV_OUTPROJ)
    for tensor, projection in zip(names, anatomy.family.mixer, strict=True):
        yield name_of(tensor, layer), _weight(anatomy, layer, projection)
    yield name_of(MODEL_TENSOR.SHORTCONV_CONV, layer), taps_of(anatomy, layer)


def taps_of(anatomy: Anatomy, layer: int) -> Array:
    """Return the taps (D, L) of a layer's short convolution."""
    block = anatomy.layers[layer].get_submodule(anatomy.family.mixer_module)
    (taps,) = (x for x in block.children() if isinstance(x, nn.Conv1d))
    return array_of(taps.weight).squeeze(1)


def mamba2(anatomy: Anatomy, arch: Arch, layer: int) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of Mamba 2: its projections, taps, and a decay and a skip for each head."""
    config = anatomy.config
    block: Any = anatomy.layers[layer].get_submodule(anatomy.family.mixer_module)
    reads, out = (_weight(anatomy, layer, x) for x in anatomy.family.mixer)
    states = config.mamba_n_groups * config.mamba_d_state
    sizes = (out.shape[1], out.shape[1], states, states, config.mamba_n_heads)
    factors = [arch.folded_in(f"mixer.{i}", config) for i in range(len(sizes))]
    yield name_of(MODEL_TENSOR.SSM_IN, layer), reads * _each(factors, sizes)
    yield name_of(MODEL_TENSOR.SSM_CONV1D, layer), taps_of(anatomy, layer)
    if block.conv1d.bias is not None:
        yield name_of(MODEL_TENSOR.SSM_CONV1D, layer, "bias"), array_of(block.conv1d.bias)
    yield name_of(MODEL_TENSOR.SSM_DT, layer, "bias"), array_of(block.dt_bias)
    for tensor, values in (
        (MODEL_TENSOR.SSM_A, -np.exp(array_of(block.A_log))),
        (MODEL_TENSOR.SSM_D, array_of(block.D)),
    ):
        yield name_of(tensor, layer).removesuffix(".weight"), values[:, None]
    if getattr(getattr(block, "norm", None), "weight", None) is not None:
        norm = array_of(block.norm.weight).reshape(config.mamba_n_groups, -1)
        yield name_of(MODEL_TENSOR.SSM_NORM, layer), norm
    yield (
        name_of(MODEL_TENSOR.SSM_OUT, layer),
        out * np.float32(arch.folded_in("mixer.out", config)),
    )


def _each(factors: Sequence[float], sizes: Sequence[int]) -> Array:
    """Return a column with a factor for each row: of what the input projection stacks."""
    return np.repeat(np.asarray(factors, np.float32), sizes)[:, None]


def delta_net(anatomy: Anatomy, layer: int, tiled: bool) -> Iterator[tuple[str, Array]]:
    """Yield a gated delta rule's tensors.

    Args:
        anatomy: the model.
        layer: which layer.
        tiled: whether value heads are ordered by their place among those of a key head first.
    """
    config = anatomy.config
    groups = config.linear_num_key_heads
    block = anatomy.layers[layer].get_submodule(anatomy.family.mixer_module)
    *reads, out = (_weight(anatomy, layer, x) for x in anatomy.family.mixer)

    def ordered(heads: Array) -> Array:
        """Return what has a row, or several, for each value head, in the file's order."""
        each = heads.reshape(groups, config.linear_num_value_heads // groups, -1, *heads.shape[1:])
        return (each.swapaxes(0, 1) if tiled else each).reshape(heads.shape)

    keys = 2 * groups * config.linear_key_head_dim
    qkv, gate, *rates = reads if len(reads) == 4 else _apart(anatomy, *reads)
    taps = taps_of(anatomy, layer)
    for name, rows in ((MODEL_TENSOR.ATTN_QKV, qkv), (MODEL_TENSOR.SSM_CONV1D, taps)):
        yield name_of(name, layer), np.concatenate([rows[:keys], ordered(rows[keys:])])
    yield name_of(MODEL_TENSOR.ATTN_GATE, layer), ordered(gate)
    if len(reads) == 4:
        yield name_of(MODEL_TENSOR.SSM_BETA, layer), ordered(rates[0])
        yield name_of(MODEL_TENSOR.SSM_ALPHA, layer), ordered(rates[1])
    else:
        yield name_of(MODEL_TENSOR.SSM_BETA_ALPHA, layer), rates[0]
    own = dict(block.named_parameters(recurse=False))
    yield name_of(MODEL_TENSOR.SSM_DT, layer, "bias"), ordered(array_of(own["dt_bias"]))
    decay = name_of(MODEL_TENSOR.SSM_A, layer).removesuffix(".weight")
    yield decay, -np.exp(ordered(array_of(own["A_log"])))
    (norm,) = (x for x in block.children() if cast(Tensor, x.weight).ndim == 1)
    yield name_of(MODEL_TENSOR.SSM_NORM, layer), array_of(cast(Tensor, norm.weight))
    yield name_of(MODEL_TENSOR.SSM_OUT, layer), ordered(out.T).T


def _apart(anatomy: Anatomy, mixed: Array, rates: Array) -> tuple[Array, Array, Array]:
    """Return rows by kind where beside each key head stand its query, key, values and gates."""
    config = anatomy.config
    groups, keys = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_value_head_dim * config.linear_num_value_heads // groups
    by_head = mixed.reshape(groups, -1, mixed.shape[1])
    *qkv, gate = (
        x.reshape(-1, mixed.shape[1])
        for x in np.split(by_head, np.cumsum([keys, keys, values]), axis=1)
    )
    return np.concatenate(qkv), gate, rates


def _weight(anatomy: Anatomy, layer: int, projection: Projection) -> Array:
    linear = anatomy.linear(layer, projection)
    assert linear is not None
    return array_of(linear.weight)


def latent_attention(anatomy: Anatomy, layer: int) -> Iterator[tuple[str, Array]]:
    """Yield the maps to latents and back; keys and values of a head apart.

    llama.cpp norms latents with the model's epsilon, and stock classes with one of their own.
    Multiplied by the root of their ratio, what is normed comes out the same.
    """
    config = anatomy.config
    direct, q_a, q_b, kv_a, kv_b, out = (
        None if linear is None else array_of(linear.weight)
        for linear in (anatomy.linear(layer, x) for x in anatomy.family.attention)
    )
    q_norm, kv_norm = (anatomy.without_lora(layer, x) for x in anatomy.family.latent_norms)
    epsilon = float(getattr(config, anatomy.family.config_names["epsilon"]))
    if direct is not None:
        yield name_of(MODEL_TENSOR.ATTN_Q, layer), direct
    if q_a is not None and q_b is not None:
        factor = np.float32((epsilon / q_norm.variance_epsilon) ** 0.5)
        yield name_of(MODEL_TENSOR.ATTN_Q_A, layer), q_a * factor
        yield name_of(MODEL_TENSOR.ATTN_Q_A_NORM, layer), array_of(q_norm.weight)
        yield name_of(MODEL_TENSOR.ATTN_Q_B, layer), q_b
    assert kv_a is not None
    assert kv_b is not None
    assert out is not None
    factors_O = np.ones(len(kv_a), np.float32)
    factors_O[: kv_b.shape[1]] = (epsilon / kv_norm.variance_epsilon) ** 0.5
    yield name_of(MODEL_TENSOR.ATTN_KV_A_MQA, layer), kv_a * factors_O[:, None]
    yield name_of(MODEL_TENSOR.ATTN_KV_A_NORM, layer), array_of(kv_norm.weight)
    heads_HOI = kv_b.reshape(-1, config.qk_nope_head_dim + anatomy.head_dim, kv_b.shape[1])
    keys, values = np.split(heads_HOI, [config.qk_nope_head_dim], axis=1)
    yield name_of(MODEL_TENSOR.ATTN_K_B, layer), keys.transpose(0, 2, 1)
    yield name_of(MODEL_TENSOR.ATTN_V_B, layer), values
    yield name_of(MODEL_TENSOR.ATTN_OUT, layer), out


def sinks(anatomy: Anatomy, layer: int) -> Iterator[tuple[str, Array]]:
    """Yield what a layer's heads attend to beside tokens."""
    for path in anatomy.family.per_head:
        yield (
            name_of(MODEL_TENSOR.ATTN_SINKS, layer),
            array_of(anatomy.layers[layer].get_parameter(path)),
        )


def experts(
    anatomy: Anatomy, mixture: Mixture, layer: int, factor: float
) -> Iterator[tuple[str, Array]]:
    """Yield a layer's router, stacks (E, O, I) with biases (E, O), and shared expert."""
    yield name_of(MODEL_TENSOR.FFN_GATE_INP, layer), array_of(mixture.router.weight)
    if getattr(mixture.router, "bias", None) is not None:
        yield name_of(MODEL_TENSOR.FFN_GATE_INP, layer, "bias"), array_of(mixture.router.bias)
    for path in anatomy.family.buffers:
        name = name_of(MODEL_TENSOR.FFN_EXP_PROBS_B, layer, "bias")
        yield name, array_of(anatomy.layers[layer].get_buffer(path))
    gated, down = mixture.entry.projections
    gate, up = _halves(mixture, _stack(mixture, gated))
    yield name_of(MODEL_TENSOR.FFN_GATE_EXP, layer), gate
    yield name_of(MODEL_TENSOR.FFN_UP_EXP, layer), up
    yield name_of(MODEL_TENSOR.FFN_DOWN_EXP, layer), _stack(mixture, down) * np.float32(factor)
    if (bias := mixture.bias(gated)) is not None:
        gate, up = _halves(mixture, array_of(bias))
        yield name_of(MODEL_TENSOR.FFN_GATE_EXP, layer, "bias"), gate
        yield name_of(MODEL_TENSOR.FFN_UP_EXP, layer, "bias"), up
    if (bias := mixture.bias(down)) is not None:
        yield name_of(MODEL_TENSOR.FFN_DOWN_EXP, layer, "bias"), array_of(bias) * np.float32(factor)
    yield from _shared_expert(anatomy, mixture, layer)


def _stack(mixture: Mixture, projection: Projection) -> Array:
    """Return a projection's weights (E, O, I)."""
    stacked = array_of(mixture.stack(projection))
    return np.ascontiguousarray(stacked.swapaxes(1, 2)) if mixture.entry.transposed else stacked


def _halves(mixture: Mixture, rows: Array) -> tuple[Array, Array]:
    """Return the gate's and the up projection's rows, of weights (E, O, I) or biases (E, O)."""
    if mixture.entry.interleaved:
        return rows[:, ::2].copy(), rows[:, 1::2].copy()
    gate, up = np.split(rows, 2, axis=1)
    return gate, up


def _shared_expert(anatomy: Anatomy, mixture: Mixture, layer: int) -> Iterator[tuple[str, Array]]:
    roles = (MODEL_TENSOR.FFN_GATE_SHEXP, MODEL_TENSOR.FFN_UP_SHEXP, MODEL_TENSOR.FFN_DOWN_SHEXP)
    for role, projection in zip(roles, mixture.entry.shared, strict=False):
        yield name_of(role, layer), _weight(anatomy, layer, projection)
    if mixture.entry.shared_gate:
        weigh: Any = anatomy.layers[layer].get_submodule(mixture.entry.shared_gate)
        yield name_of(MODEL_TENSOR.FFN_GATE_INP_SHEXP, layer), array_of(weigh.weight)[0]
