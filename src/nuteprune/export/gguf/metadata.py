"""The keys of a GGUF file from which llama.cpp builds a model: sizes, experts, rotary embedding.

Each function returns them without the architecture's name before them. A file states an int as
uint32 and a float as float32, so a value that is a float in the file must be one here.
"""

from __future__ import annotations

from typing import Any

from gguf import ExpertGatingFuncType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nuteprune.errors import UserError
from nuteprune.export.gguf.architectures import Architecture
from nuteprune.export.gguf.block_tensors import taps_of
from nuteprune.export.gguf.refusals import ModelFacts, expert_period
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.shape import Shape

Keys = dict[str, Any]
_SECTIONS = (11, 11, 10)
"""transformers' default for how rotary frequencies are shared out to the axes of a position."""


def model_keys(anatomy: Anatomy, arch: Architecture, facts: ModelFacts, shape: Shape) -> Keys:
    """Return the keys from which llama.cpp builds a model of a shape.

    Raises:
        UserError: if the config has a number that a file has no room for.
    """
    config, family = facts.config, facts.family
    keys = _count_keys(arch, facts, shape) | _mixer_keys(anatomy, arch, facts)
    keys |= _expert_keys(anatomy, arch, shape)
    keys["vocab_size"] = config.vocab_size
    keys["context_length"] = context_length(arch, facts)
    keys["embedding_length"] = shape.hidden
    keys["block_count"] = len(shape.layers)
    keys |= _head_keys(facts)
    if family.norm.startswith("layer"):
        norm: Any = anatomy.final_norm  # OLMo's has no attribute, and the default
        epsilon = getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-5))
        keys["attention.layer_norm_epsilon"] = float(epsilon)
        if hasattr(config, "use_parallel_residual"):
            keys["use_parallel_residual"] = config.use_parallel_residual
    else:
        epsilon = getattr(config, family.config_names["epsilon"])
        keys["attention.layer_norm_rms_epsilon"] = float(epsilon)
    keys |= _rope_keys(facts)
    if arch.optional_rope:  # llama.cpp's name for whether there is one
        keys["rope.scaling.finetuned"] = facts.rotates
    if arch.window_period is not None and not arch.chunked:
        keys["attention.sliding_window"] = facts.window or 0
    stated = {}
    if arch.softcaps:
        stated["final_logit_softcapping"] = family.logit_softcap
        stated["attn_logit_softcapping"] = family.attention_softcap
    if family.attention_clip and getattr(config, family.attention_clip):
        stated["attention.clamp_kqv"] = family.attention_clip
    if family.logit_multiplier and not arch.folded:
        stated["logit_scale"] = family.logit_multiplier
    if arch.multipliers and family.multipliers:
        stated["embedding_scale"], stated["residual_scale"] = family.multipliers
    keys |= {key: float(getattr(config, name or "")) for key, name in stated.items()}
    if arch.multipliers:
        keys["attention.scale"] = anatomy.attention_scale(shape.first_attention)
        keys["logit_scale"] = float(getattr(config, family.logit_divisor or ""))
    for key, value in keys.items():
        if isinstance(value, int) and not 0 <= value < 2**32:
            raise UserError(f"a GGUF file cannot state {key} {value}: mend the model's config.json")
    return keys


def _count_keys(arch: Architecture, facts: ModelFacts, shape: Shape) -> Keys:
    """Return how many heads and neurons there are, in each layer or in all."""
    layers, each = shape.layers, arch.per_layer
    heads, kv_heads = [x.heads for x in layers], [x.kv_heads for x in layers]
    neurons = [x.neurons for x in layers]
    if arch.experts is not None:  # the layers without are alike, and so are the others
        dense = [x.neurons for x in layers if not x.experts]
        neurons = dense or [x.expert_neurons for x in layers]
    most = 1 if facts.family.latent else max(kv_heads)
    # Where there are none, an architecture has a convolution or Mamba 2.
    states_kv_heads = each or arch.mixer in ("convolution", "mamba2")
    return {
        "attention.head_count": heads if each else max(heads),
        "attention.head_count_kv": kv_heads if states_kv_heads else most,
        "feed_forward_length": neurons if each else max(neurons),
    }


def _head_keys(facts: ModelFacts) -> Keys:
    """Return how wide heads are."""
    config, key, value = facts.config, facts.head_dim, facts.head_dim
    further: Keys = {}
    if facts.family.latent:
        # What is cached: one head of the latent, and of the features that are rotated beside it.
        rotated = facts.rotary_dimensions
        further["attention.key_length_mla"] = config.qk_nope_head_dim + rotated
        further["attention.value_length_mla"] = value
        further["attention.kv_lora_rank"] = config.kv_lora_rank
        further["attention.q_lora_rank"] = config.q_lora_rank or 0
        key, value = config.kv_lora_rank + rotated, config.kv_lora_rank
    return {"attention.key_length": key, "attention.value_length": value, **further}


def _mixer_keys(anatomy: Anatomy, arch: Architecture, facts: ModelFacts) -> Keys:
    """Return the sizes of what mixes tokens otherwise than attention."""
    config, layers = facts.config, facts.shape.layers
    if not arch.mixer:
        return {}
    taps = taps_of(anatomy, next(i for i, x in enumerate(layers) if x.mixer)).shape[1]
    if arch.mixer == "convolution":
        return {"shortconv.l_cache": taps}
    if arch.mixer == "mamba2":
        states, groups = config.mamba_d_state, config.mamba_n_groups
        heads, head_dim = config.mamba_n_heads, config.mamba_d_head
    else:
        states, groups = config.linear_key_head_dim, config.linear_num_key_heads
        heads, head_dim = config.linear_num_value_heads, config.linear_value_head_dim
    keys: Keys = {
        "ssm.conv_kernel": taps,
        "ssm.state_size": states,
        "ssm.group_count": groups,
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * head_dim,
    }
    if arch.mixer != "mamba2":
        keys["full_attention_interval"] = facts.shape.first_attention + 1
    if arch.mixer == "tiled_delta_net":  # of images' positions; those of text are all one
        keys["rope.dimension_sections"] = [*facts.rope.get("mrope_section", _SECTIONS), 0]
    return keys


def _expert_keys(anatomy: Anatomy, arch: Architecture, shape: Shape) -> Keys:
    """Return how many experts there are, how wide they are, and how tokens are routed to them."""
    experts, config = arch.experts, anatomy.config
    if experts is None:
        return {}
    layer = next(x for x in shape.layers if x.experts)
    keys: Keys = {"expert_count": layer.experts, "expert_used_count": anatomy.per_token}
    if experts.own_width:
        keys["expert_feed_forward_length"] = layer.expert_neurons
    if experts.shared == "own":
        keys["expert_shared_feed_forward_length"] = layer.neurons
    if experts.shared == "times":
        keys["expert_shared_count"] = layer.neurons // layer.expert_neurons
    if experts.dense == "first":
        keys["leading_dense_block_count"] = sum(not x.experts for x in shape.layers)
    if experts.dense == "between":
        keys["interleave_moe_layer_step"] = expert_period(shape)
    if experts.states_weights:
        keys["expert_gating_func"] = int(ExpertGatingFuncType.SIGMOID)
        keys["expert_weights_norm"] = bool(config.norm_topk_prob)
        keys["expert_weights_scale"] = float(config.routed_scaling_factor)
    if experts.groups and anatomy.groups > 1:
        keys |= {"expert_group_count": anatomy.groups, "expert_group_used_count": config.topk_group}
    return keys


def context_length(arch: Architecture, facts: ModelFacts) -> int:
    """Return the context length; at most the window where llama.cpp ignores windows."""
    longest = int(facts.config.max_position_embeddings)
    return longest if arch.window_period is not None else min(longest, facts.window or longest)


def _rope_keys(facts: ModelFacts) -> Keys:
    """Return how queries and keys are rotated."""
    rope, kind = facts.rope, facts.rope.get("rope_type", "default")
    keys: Keys = {
        "rope.dimension_count": facts.rotary_dimensions,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if kind in ("linear", "longrope", "yarn"):
        keys["rope.scaling.type"] = kind
    if kind in ("linear", "yarn"):
        keys["rope.scaling.factor"] = float(rope["factor"])
    if kind == "longrope":
        keys["rope.scaling.attn_factor"] = float(ROPE_INIT_FUNCTIONS[kind](facts.config, "cpu")[1])
    if kind in ("longrope", "yarn"):
        original = int(rope["original_max_position_embeddings"])
        keys["rope.scaling.original_context_length"] = original
    if kind == "yarn":
        keys["rope.scaling.yarn_beta_fast"] = float(rope.get("beta_fast") or 32.0)
        keys["rope.scaling.yarn_beta_slow"] = float(rope.get("beta_slow") or 1.0)
        if rope.get("mscale_all_dim"):
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return keys
