"""What many families have in common: entries that others differ from in a few facts."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from nuteprune.model.family import CONFIG_NAMES, Family, Projection

GATED_MLP = (
    Projection("mlp.gate_proj", ("neurons",), "hidden"),
    Projection("mlp.up_proj", ("neurons",), "hidden"),
    Projection("mlp.down_proj", ("hidden",), "neurons"),
)

FUSED_MLP = (
    Projection("mlp.gate_up_proj", ("neurons", "neurons"), "hidden"),
    Projection("mlp.down_proj", ("hidden",), "neurons"),
)

PLAIN_MLP = (
    Projection("mlp.up_proj", ("neurons",), "hidden"),
    Projection("mlp.down_proj", ("hidden",), "neurons"),
)

QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

LLAMA = Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    attention=(
        Projection("self_attn.q_proj", ("q",), "hidden"),
        Projection("self_attn.k_proj", ("kv",), "hidden"),
        Projection("self_attn.v_proj", ("kv",), "hidden"),
        Projection("self_attn.o_proj", ("hidden",), "q"),
    ),
    mlp=GATED_MLP,
    heads_divide_hidden=True,
    gguf=("llama", "deci"),
)

PLAIN = replace(LLAMA, heads_divide_hidden=False)
"""All facts of LLaMA except its config's demand on heads."""

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    causal_lm="Gemma2ForCausalLM",
    norm="rms_1p",
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    scaled_embedding=True,
    logit_softcap="final_logit_softcapping",
    attention_softcap="attn_logit_softcapping",
    activation="hidden_activation",
    gguf=("gemma2",),
)

GLM = replace(
    PLAIN,
    model_type="glm",
    causal_lm="GlmForCausalLM",
    mlp=FUSED_MLP,
    gguf=("chatglm",),
    rope_pairs="neighbours",
)

POST_NORM = replace(
    PLAIN,
    attention_norms=("post_attention_layernorm",),
    mlp_norms=("post_feedforward_layernorm",),
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    qk_norms=QK_NORMS,
    gguf=(),
)
"""Blocks read the residual stream as it is; what they write is normed."""

OLMO2 = replace(POST_NORM, joint_qk_norms=True, counts_heads=True)

LAYER_NORM = replace(
    PLAIN,
    norm="layer",
    config_names=MappingProxyType({k: v for k, v in CONFIG_NAMES.items() if k != "epsilon"}),
    gguf=(),
)

SHARED_NORM = replace(
    LAYER_NORM, attention_norms=(), mlp_norms=(), shared_norms=("input_layernorm",)
)
"""Both blocks read one norm, side by side."""
