"""Mixtures of experts: frozen data, one short entry per family."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from nuteprune.model.builds import GATED_MLP, PLAIN, QK_NORMS
from nuteprune.model.family import CONFIG_NAMES, EXPERT_NAMES, Experts, Projection
from nuteprune.model.hybrids import QWEN3_5, mixer

_ALL_EXPERTS = MappingProxyType(
    {"neurons": "all of its neurons are those of experts; use --gates expert_neurons"}
)
_SHARED_WIDTH = (
    "the stock class makes the shared expert as wide as the routed ones; use --shapes free"
)


def _within(module: str) -> tuple[Projection, ...]:
    """Return a gated MLP's projections where they are of another module."""
    return tuple(replace(x, path=x.path.replace("mlp.", f"{module}.")) for x in GATED_MLP)


MIXTRAL = replace(
    PLAIN,
    model_type="mixtral",
    causal_lm="MixtralForCausalLM",
    mlp=GATED_MLP,
    experts=Experts(),
    config_names=EXPERT_NAMES,
    refused=_ALL_EXPERTS,
    gguf=("llama, experts",),
)

QWEN3_MOE = replace(
    PLAIN,
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    qk_norms=QK_NORMS,
    experts=Experts(count_in_4="num_experts"),
    config_names=MappingProxyType(
        {
            **CONFIG_NAMES,
            "experts": "num_local_experts",
            "expert_neurons": "moe_intermediate_size",
        }
    ),
    gguf=("qwen3moe",),
)

QWEN2_MOE = replace(
    QWEN3_MOE,
    model_type="qwen2_moe",
    causal_lm="Qwen2MoeForCausalLM",
    vllm_head_dim_from_hidden=True,
    qk_norms=(),
    experts=Experts(shared=_within("mlp.shared_expert"), shared_gate="mlp.shared_expert_gate"),
    config_names=MappingProxyType(
        {
            **QWEN3_MOE.config_names,
            "experts": "num_experts",
            "shared_neurons": "shared_expert_intermediate_size",
        }
    ),
    gguf=("qwen2moe",),
)

QWEN3_NEXT = replace(
    QWEN3_5,
    model_type="qwen3_next",
    causal_lm="Qwen3NextForCausalLM",
    mixer=mixer("linear_attn", "in_proj_qkvz", "in_proj_ba"),
    experts=QWEN2_MOE.experts,
    config_names=QWEN2_MOE.config_names,
    gguf=("qwen3next",),
)

GLM4_MOE = replace(
    QWEN3_MOE,
    model_type="glm4_moe",
    causal_lm="Glm4MoeForCausalLM",
    experts=Experts(
        shared=_within("mlp.shared_experts"),
        shared_times="n_shared_experts",
        groups="n_group",
    ),
    buffers=("mlp.gate.e_score_correction_bias",),
    gguf=("glm4moe",),
    refused=MappingProxyType(
        {"neurons uniform": _SHARED_WIDTH, "expert_neurons uniform": _SHARED_WIDTH}
    ),
)

DEEPSEEK_V3 = replace(
    GLM4_MOE,
    model_type="deepseek_v3",
    causal_lm="DeepseekV3ForCausalLM",
    attention=(
        Projection("self_attn.q_proj", ("latent",), "hidden"),  # or the next two
        Projection("self_attn.q_a_proj", ("latent",), "hidden"),
        Projection("self_attn.q_b_proj", ("latent",), "latent"),
        Projection("self_attn.kv_a_proj_with_mqa", ("latent",), "hidden"),
        Projection("self_attn.kv_b_proj", ("latent",), "latent"),
        Projection("self_attn.o_proj", ("hidden",), "q"),
    ),
    counts_heads=True,
    qk_norms=(),
    latent=("kv_lora_rank", "qk_rope_head_dim"),
    vllm_backend=False,
    latent_norms=("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
    config_names=MappingProxyType(
        {**GLM4_MOE.config_names, "experts": "n_routed_experts", "head_dim": "v_head_dim"}
    ),
    rope_pairs="neighbours",
    gguf=("deepseek2",),
)

LLAMA4 = replace(
    PLAIN,
    model_type="llama4_text",
    causal_lm="Llama4ForCausalLM",
    vllm_backend=False,
    mlp=_within("feed_forward"),
    mlp_modules=("feed_forward",),
    qk_norms=("self_attn.qk_norm",),
    experts=Experts(
        projections=(
            Projection(
                "feed_forward.experts.gate_up_proj", ("expert_neurons", "expert_neurons"), "hidden"
            ),
            Projection("feed_forward.experts.down_proj", ("hidden",), "expert_neurons"),
        ),
        router="feed_forward.router",
        shared=_within("feed_forward.shared_expert"),
        shared_times=1,
        transposed=True,
        weighed_first=True,
    ),
    config_names=MappingProxyType(
        {
            **CONFIG_NAMES,
            "neurons": "intermediate_size_mlp",
            "experts": "num_local_experts",
            "expert_neurons": "intermediate_size",
        }
    ),
    rope_pairs="neighbours",
    refused=GLM4_MOE.refused,
    gguf=("llama4",),
)

MIXTURES = (
    MIXTRAL,
    replace(
        MIXTRAL,
        model_type="olmoe",
        causal_lm="OlmoeForCausalLM",
        qk_norms=QK_NORMS,
        joint_qk_norms=True,
        counts_heads=True,
        config_names=MappingProxyType({**EXPERT_NAMES, "experts": "num_experts"}),
        attention_clip="clip_qkv",
        gguf=("olmoe",),
        refused=MappingProxyType(
            {**_ALL_EXPERTS, "hidden": "its norms of queries and keys are as wide as the model"}
        ),
    ),
    QWEN3_MOE,
    QWEN2_MOE,
    QWEN3_NEXT,
    replace(
        QWEN3_5,
        model_type="qwen3_5_moe_text",
        causal_lm="Qwen3_5MoeForCausalLM",
        experts=QWEN2_MOE.experts,
        # No layer is without experts, so neurons are those of shared ones.
        config_names=MappingProxyType(
            {**QWEN2_MOE.config_names, "neurons": "shared_expert_intermediate_size"}
        ),
        gguf=("qwen35moe",),
    ),
    GLM4_MOE,
    DEEPSEEK_V3,
    replace(
        MIXTRAL,
        model_type="granitemoe",
        causal_lm="GraniteMoeForCausalLM",
        vllm_head_dim_from_hidden=True,
        mlp_modules=("block_sparse_moe",),
        experts=Experts(
            projections=(
                Projection(
                    "block_sparse_moe.experts.gate_up_proj",
                    ("expert_neurons", "expert_neurons"),
                    "hidden",
                ),
                Projection("block_sparse_moe.experts.down_proj", ("hidden",), "expert_neurons"),
            ),
            router="block_sparse_moe.router",
            files=(".experts.", ".input_linear.", ".output_linear."),
        ),
        logit_divisor="logits_scaling",
        multipliers=("embedding_multiplier", "residual_multiplier"),
        gguf=("granitemoe",),
    ),
    replace(
        MIXTRAL,
        model_type="gpt_oss",
        causal_lm="GptOssForCausalLM",
        experts=Experts(router="mlp.router", transposed=True, gives_pair=True, interleaved=True),
        # While heads are masked, attention wants a sink for each.
        per_head=("self_attn.sinks",),
        counts_heads=True,
        gguf=("gpt-oss",),
    ),
    LLAMA4,
)
