"""The keys of a GGUF file from which llama.cpp builds a model: sizes, experts, rotary embedding."""

from __future__ import annotations

from typing import Any

from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nuteprune.export.gguf_arch import Arch
from nuteprune.export.gguf_blocks import taps_of
from nuteprune.export.gguf_fit import Source, expert_period
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.shape import Shape

_ROPE_SCALING = {
    "linear": RopeScalingType.LINEAR,
    "longrope": RopeScalingType.LONGROPE,
    "yarn": RopeScalingType.YARN,
}
_BY_HEADS = ("convolution", "mamba2")
"""Mixers of layers that state no heads."""
_SECTIONS = (11, 11, 10)
"""What transformers takes where a config does not say which frequencies are of which position."""


def write_dimensions(
    writer: GGUFWriter, anatomy: Anatomy, arch: Arch, source: Source, shape: Shape
) -> None:
    """Write the keys from which llama.cpp builds the model."""
    config, family = source.config, source.family
    _write_counts(writer, arch, shape)
    _write_mixers(writer, anatomy, arch, source)
    _write_experts(writer, anatomy, arch, source)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(arch, source))
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(len(shape.layers))
    _write_head_sizes(writer, arch, source)
    if family.norm.startswith("layer"):
        writer.add_layer_norm_eps(_epsilon(anatomy.final_norm))
        if hasattr(config, "use_parallel_residual"):
            writer.add_parallel_residual(config.use_parallel_residual)
    else:
        writer.add_layer_norm_rms_eps(getattr(config, family.config_names["epsilon"]))
    _write_rope(writer, source)
    if arch.optional_rope:  # llama.cpp's name for whether there is one
        writer.add_rope_scaling_finetuned(source.rotates)
    if arch.window_period is not None and not arch.chunked:
        writer.add_sliding_window(source.window or 0)
    if arch.softcaps:
        writer.add_final_logit_softcapping(getattr(config, family.logit_softcap or ""))
        writer.add_attn_logit_softcapping(getattr(config, family.attention_softcap or ""))
    if family.attention_clip and (bound := getattr(config, family.attention_clip)):
        writer.add_clamp_kqv(bound)
    if family.logit_multiplier and not arch.folded:
        writer.add_logit_scale(getattr(config, family.logit_multiplier))
    if arch.multipliers:
        embedding, residual = family.multipliers or ("", "")
        writer.add_embedding_scale(getattr(config, embedding))
        writer.add_residual_scale(getattr(config, residual))
        writer.add_attention_scale(anatomy.attention_scale(shape.first_attention))
        writer.add_logit_scale(getattr(config, family.logit_divisor or ""))


def _write_counts(writer: GGUFWriter, arch: Arch, shape: Shape) -> None:
    """Write how many heads and neurons there are, in each layer or in all."""
    heads, kv_heads, neurons = (
        list(x) for x in zip(*((x.heads, x.kv_heads, x.neurons) for x in shape.layers), strict=True)
    )
    if arch.experts is not None:  # the layers without are alike, and so are the others
        dense = [x.neurons for x in shape.layers if not x.experts]
        neurons = dense or [x.expert_neurons for x in shape.layers]
    for add, values, by_layer in (
        (writer.add_head_count, heads, arch.per_layer),
        # Where there are none, an architecture has a convolution or Mamba 2.
        (writer.add_head_count_kv, kv_heads, arch.per_layer or arch.mixer in _BY_HEADS),
        (writer.add_feed_forward_length, neurons, arch.per_layer),
    ):
        add(values if by_layer else 1 if arch.latent and values is kv_heads else max(values))


def _write_head_sizes(writer: GGUFWriter, arch: Arch, source: Source) -> None:
    config = source.config
    if not arch.latent:
        writer.add_key_length(source.head_dim)
        writer.add_value_length(source.head_dim)
        return
    # What is cached: one head of the latent, and of the features that are rotated beside it.
    rotated = source.rotary_dimensions
    writer.add_key_length(config.kv_lora_rank + rotated)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + rotated)
    writer.add_value_length_mla(source.head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_q_lora_rank(config.q_lora_rank or 0)


def _write_mixers(writer: GGUFWriter, anatomy: Anatomy, arch: Arch, source: Source) -> None:
    config, shape = source.config, source.shape
    if not arch.mixer:
        return
    taps = taps_of(anatomy, next(i for i, x in enumerate(shape.layers) if x.mixer)).shape[1]
    if arch.mixer == "convolution":
        writer.add_shortconv_l_cache(taps)
        return
    writer.add_ssm_conv_kernel(taps)
    if arch.mixer == "mamba2":
        writer.add_ssm_state_size(config.mamba_d_state)
        writer.add_ssm_group_count(config.mamba_n_groups)
        writer.add_ssm_time_step_rank(config.mamba_n_heads)
        writer.add_ssm_inner_size(config.mamba_n_heads * config.mamba_d_head)
        return
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(shape.first_attention + 1)
    if arch.mixer == "tiled_delta_net":  # of images' positions; those of text are all one
        writer.add_rope_dimension_sections([*source.rope.get("mrope_section", _SECTIONS), 0])


def _write_experts(writer: GGUFWriter, anatomy: Anatomy, arch: Arch, source: Source) -> None:
    experts, config, shape = arch.experts, source.config, source.shape
    if experts is None:
        return
    layer = next(x for x in shape.layers if x.experts)
    writer.add_expert_count(layer.experts)
    writer.add_expert_used_count(anatomy.per_token)
    if experts.own_width:
        writer.add_expert_feed_forward_length(layer.expert_neurons)
    if experts.shared == "own":
        writer.add_expert_shared_feed_forward_length(layer.neurons)
    if experts.shared == "times":
        writer.add_expert_shared_count(layer.neurons // layer.expert_neurons)
    if experts.dense == "first":
        writer.add_leading_dense_block_count(sum(not x.experts for x in shape.layers))
    if experts.dense == "between":
        writer.add_interleave_moe_layer_step(expert_period(shape))
    if experts.states_weights:
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
    if experts.groups and anatomy.groups > 1:
        writer.add_expert_group_count(anatomy.groups)
        writer.add_expert_group_used_count(config.topk_group)


def _epsilon(norm: Any) -> float:
    """Return a LayerNorm's epsilon; OLMo's has no attribute, and the default."""
    return float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-5)))


def context_length(arch: Arch, source: Source) -> int:
    """Return the context length; with windows that llama.cpp ignores, what all layers see."""
    longest = int(source.config.max_position_embeddings)
    return longest if arch.window_period is not None else min(longest, source.window or longest)


def _write_rope(writer: GGUFWriter, source: Source) -> None:
    rope, kind = source.rope, source.rope.get("rope_type", "default")
    writer.add_rope_dimension_count(source.rotary_dimensions)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in _ROPE_SCALING:
        writer.add_rope_scaling_type(_ROPE_SCALING[kind])
    if kind == "linear":
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
        if rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if kind == "longrope":
        factor = ROPE_INIT_FUNCTIONS[kind](source.config, "cpu")[1]
        writer.add_rope_scaling_attn_factors(factor)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
