"""Tensors of a layer's other parts (experts, mixers, latents), as llama.cpp wants them.

Experts, latent attention, and what mixes tokens otherwise: convolutions, Mamba 2 and delta rules.
Names are those of a GGUF file without the layer's `blk.N.` before them.

Shape suffixes: D hidden width, E experts, O rows (outputs), I columns (inputs), L taps, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nuteprune.export.gguf.architectures import Architecture
from nuteprune.model.anatomy import Anatomy, Mixture
from nuteprune.model.family import Projection

Array = NDArray[np.float32]
Named = Iterator[tuple[str, Array]]
"""Name and values of one tensor after the other."""


def values_of(tensor: Tensor) -> Array:
    """Return a tensor's values."""
    return tensor.detach().to("cpu", torch.float32).numpy()


def _weight(anatomy: Anatomy, layer: int, projection: Projection) -> Array:
    linear = anatomy.linear(layer, projection)
    assert linear is not None
    return values_of(linear.weight)


def mixer_tensors(anatomy: Anatomy, arch: Architecture, layer: int) -> Named:
    """Yield the tensors of a layer's mixer: a recurrence or a convolution."""
    block: Any = anatomy.layers[layer].get_submodule(anatomy.family.mixer_module)
    weights = [_weight(anatomy, layer, x) for x in anatomy.family.mixer]
    taps = taps_of(anatomy, layer)
    if arch.mixer == "convolution":
        yield from zip(
            ("shortconv.in_proj.weight", "shortconv.out_proj.weight"), weights, strict=True
        )
        yield "shortconv.conv.weight", taps
    elif arch.mixer == "mamba2":
        yield from _mamba2_tensors(anatomy.config, arch, block, taps, *weights)
    else:
        yield from _delta_net_tensors(anatomy.config, arch, block, taps, *weights)


def taps_of(anatomy: Anatomy, layer: int) -> Array:
    """Return the taps (D, L) of a layer's short convolution."""
    block = anatomy.layers[layer].get_submodule(anatomy.family.mixer_module)
    (taps,) = (x for x in block.children() if isinstance(x, nn.Conv1d))
    return values_of(taps.weight).squeeze(1)


def _mamba2_tensors(
    config: Any, arch: Architecture, block: Any, taps: Array, reads: Array, out: Array
) -> Named:
    """Yield the tensors of Mamba 2: its projections, taps, and a decay and a skip for each head."""
    states = config.mamba_n_groups * config.mamba_d_state
    # What the input projection stacks; each has a factor of its own.
    sizes = (out.shape[1], out.shape[1], states, states, config.mamba_n_heads)
    factors = [arch.folded_in(f"mixer.{i}", config) for i in range(len(sizes))]
    yield "ssm_in.weight", reads * np.repeat(np.array(factors, np.float32), sizes)[:, None]
    yield "ssm_conv1d.weight", taps
    if block.conv1d.bias is not None:
        yield "ssm_conv1d.bias", values_of(block.conv1d.bias)
    yield "ssm_dt.bias", values_of(block.dt_bias)
    yield "ssm_a", -np.exp(values_of(block.A_log))[:, None]
    yield "ssm_d", values_of(block.D)[:, None]
    if getattr(getattr(block, "norm", None), "weight", None) is not None:
        yield "ssm_norm.weight", values_of(block.norm.weight).reshape(config.mamba_n_groups, -1)
    yield "ssm_out.weight", out * np.float32(arch.folded_in("mixer.out", config))


def _delta_net_tensors(
    config: Any, arch: Architecture, block: Any, taps: Array, *weights: Array
) -> Named:
    """Yield a gated delta rule's tensors."""
    *reads, out = weights
    groups = config.linear_num_key_heads
    keys = 2 * groups * config.linear_key_head_dim

    def ordered(heads: Array) -> Array:
        """Return a tensor with rows for each value head in the file's order."""
        each = heads.reshape(groups, config.linear_num_value_heads // groups, -1, *heads.shape[1:])
        tiled = arch.mixer == "tiled_delta_net"
        return (each.swapaxes(0, 1) if tiled else each).reshape(heads.shape)

    qkv, gate, *rates = reads if len(reads) == 4 else _by_kind(config, *reads)
    yield "attn_qkv.weight", np.concatenate([qkv[:keys], ordered(qkv[keys:])])
    yield "ssm_conv1d.weight", np.concatenate([taps[:keys], ordered(taps[keys:])])
    yield "attn_gate.weight", ordered(gate)
    if len(rates) == 2:
        yield "ssm_beta.weight", ordered(rates[0])
        yield "ssm_alpha.weight", ordered(rates[1])
    else:
        yield "ssm_ba.weight", rates[0]
    yield "ssm_dt.bias", ordered(values_of(block.dt_bias))
    yield "ssm_a", -np.exp(ordered(values_of(block.A_log)))
    yield "ssm_norm.weight", values_of(block.norm.weight)
    yield "ssm_out.weight", ordered(out.T).T


def _by_kind(config: Any, mixed: Array, rates: Array) -> tuple[Array, Array, Array]:
    """Return rows by kind where beside each key head stand its query, key, values and gates."""
    groups, keys = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_value_head_dim * config.linear_num_value_heads // groups
    by_head = mixed.reshape(groups, -1, mixed.shape[1])
    split = np.split(by_head, np.cumsum([keys, keys, values]), axis=1)
    *qkv, gate = (x.reshape(-1, mixed.shape[1]) for x in split)
    return np.concatenate(qkv), gate, rates


def latent_attention_tensors(anatomy: Anatomy, layer: int) -> Named:
    """Yield the maps to latents and back, with separate maps for keys and for values.

    llama.cpp norms latents with the model's epsilon, and stock classes with one of their own.
    The input of the norm is multiplied by the root of their ratio, so the output is the same.
    """
    family, nope = anatomy.family, anatomy.config.qk_nope_head_dim
    epsilon = float(getattr(anatomy.config, family.config_names["epsilon"]))
    q_norm, kv_norm = (anatomy.without_lora(layer, x) for x in family.latent_norms)
    if anatomy.linear(layer, family.attention[0]) is not None:
        yield "attn_q.weight", _weight(anatomy, layer, family.attention[0])
    else:
        q_a, q_b = (_weight(anatomy, layer, x) for x in family.attention[1:3])
        yield "attn_q_a.weight", q_a * np.float32((epsilon / q_norm.variance_epsilon) ** 0.5)
        yield "attn_q_a_norm.weight", values_of(q_norm.weight)
        yield "attn_q_b.weight", q_b
    kv_a, kv_b, out = (_weight(anatomy, layer, x) for x in family.attention[3:])
    factors_O = np.ones(len(kv_a), np.float32)
    factors_O[: kv_b.shape[1]] = (epsilon / kv_norm.variance_epsilon) ** 0.5
    yield "attn_kv_a_mqa.weight", kv_a * factors_O[:, None]
    yield "attn_kv_a_norm.weight", values_of(kv_norm.weight)
    heads_HOI = kv_b.reshape(-1, nope + anatomy.head_dim, kv_b.shape[1])
    yield "attn_k_b.weight", heads_HOI[:, :nope].transpose(0, 2, 1)
    yield "attn_v_b.weight", heads_HOI[:, nope:]
    yield "attn_output.weight", out


def expert_tensors(anatomy: Anatomy, mixture: Mixture, layer: int, factor: float) -> Named:
    """Yield a layer's router, stacks (E, O, I) with biases (E, O), and shared expert.

    Args:
        anatomy: the model.
        mixture: the layer's experts.
        layer: which layer.
        factor: multiplies what routed experts write.
    """
    yield "ffn_gate_inp.weight", values_of(mixture.router.weight)
    if getattr(mixture.router, "bias", None) is not None:
        yield "ffn_gate_inp.bias", values_of(mixture.router.bias)
    for path in anatomy.family.buffers:
        yield "exp_probs_b.bias", values_of(anatomy.layers[layer].get_buffer(path))
    gated, down = mixture.entry.projections
    for kind, values in (("weight", _stack), ("bias", _biases)):
        if (rows := values(mixture, gated)) is not None:
            gate, up = _gate_and_up(mixture, rows)
            yield f"ffn_gate_exps.{kind}", gate
            yield f"ffn_up_exps.{kind}", up
        if (rows := values(mixture, down)) is not None:
            yield f"ffn_down_exps.{kind}", rows * np.float32(factor)
    for role, projection in zip(("gate", "up", "down"), mixture.entry.shared, strict=False):
        yield f"ffn_{role}_shexp.weight", _weight(anatomy, layer, projection)
    if mixture.entry.shared_gate:
        weigh: Any = anatomy.layers[layer].get_submodule(mixture.entry.shared_gate)
        yield "ffn_gate_inp_shexp.weight", values_of(weigh.weight)[0]


def _stack(mixture: Mixture, projection: Projection) -> Array | None:
    """Return a projection's weights (E, O, I)."""
    stacked = values_of(mixture.stack(projection))
    return np.ascontiguousarray(stacked.swapaxes(1, 2)) if mixture.entry.transposed else stacked


def _biases(mixture: Mixture, projection: Projection) -> Array | None:
    """Return a projection's biases (E, O), None without any."""
    bias = mixture.bias(projection)
    return None if bias is None else values_of(bias)


def _gate_and_up(mixture: Mixture, rows: Array) -> tuple[Array, Array]:
    """Return the gate's and the up projection's rows, of weights (E, O, I) or biases (E, O)."""
    if mixture.entry.interleaved:
        return rows[:, ::2].copy(), rows[:, 1::2].copy()
    gate, up = np.split(rows, 2, axis=1)
    return gate, up
