"""Mixtures of experts: frozen data, one short entry per family."""

from __future__ import annotations

from types import MappingProxyType

from nuteprune.model.builds import GATED_MLP, PLAIN, QK_NORMS, SCALED, mixer, names, variant, within
from nuteprune.model.family import CONFIG_NAMES, Experts, Projection
from nuteprune.model.hybrids import QWEN3_5

_EXPERTS = names(
    {k: v for k, v in CONFIG_NAMES.items() if k != "neurons"},
    experts="num_local_experts",
    expert_neurons="intermediate_size",
)
"""Names in the config of a mixture whose layers all have experts."""
_ALL_EXPERTS = MappingProxyType(
    {"neurons": "all of its neurons are those of experts; use --gates expert_neurons"}
)
_SHARED_WIDTH = (
    "the stock class makes the shared expert as wide as the routed ones; use --shapes free"
)

MIXTRAL = variant(
    PLAIN,
    "mixtral",
    "Mixtral",
    experts=Experts(),
    config_names=_EXPERTS,
    refused=_ALL_EXPERTS,
    gguf=("llama, experts",),
)

QWEN3_MOE = variant(
    PLAIN,
    "qwen3_moe",
    "Qwen3Moe",
    qk_norms=QK_NORMS,
    experts=Experts(count_in_4="num_experts"),
    config_names=names(experts="num_local_experts", expert_neurons="moe_intermediate_size"),
    gguf=("qwen3moe",),
)

QWEN2_MOE = variant(
    QWEN3_MOE,
    "qwen2_moe",
    "Qwen2Moe",
    vllm_head_dim_from_hidden=True,
    qk_norms=(),
    experts=Experts(
        shared=within("mlp.shared_expert", GATED_MLP), shared_gate="mlp.shared_expert_gate"
    ),
    config_names=names(
        QWEN3_MOE.config_names,
        experts="num_experts",
        shared_neurons="shared_expert_intermediate_size",
    ),
    gguf=("qwen2moe",),
)

GLM4_MOE = variant(
    QWEN3_MOE,
    "glm4_moe",
    "Glm4Moe",
    experts=Experts(
        shared=within("mlp.shared_experts", GATED_MLP),
        shared_times="n_shared_experts",
        groups="n_group",
    ),
    buffers=("mlp.gate.e_score_correction_bias",),
    gguf=("glm4moe",),
    refused=MappingProxyType(
        {"neurons uniform": _SHARED_WIDTH, "expert_neurons uniform": _SHARED_WIDTH}
    ),
)

MIXTURES = (
    MIXTRAL,
    variant(
        MIXTRAL,
        "olmoe",
        "Olmoe",
        qk_norms=QK_NORMS,
        joint_qk_norms=True,
        counts_heads=True,
        config_names=names(_EXPERTS, experts="num_experts"),
        attention_clip="clip_qkv",
        gguf=("olmoe",),
        refused=MappingProxyType(
            {**_ALL_EXPERTS, "hidden": "its norms of queries and keys are as wide as the model"}
        ),
    ),
    QWEN3_MOE,
    QWEN2_MOE,
    variant(
        QWEN3_5,
        "qwen3_next",
        "Qwen3Next",
        mixer=mixer("linear_attn", "in_proj_qkvz", "in_proj_ba"),
        experts=QWEN2_MOE.experts,
        config_names=QWEN2_MOE.config_names,
        gguf=("qwen3next",),
    ),
    variant(
        QWEN3_5,
        "qwen3_5_moe_text",
        "Qwen3_5Moe",
        experts=QWEN2_MOE.experts,
        # No layer is without experts, so neurons are those of shared ones.
        config_names=names(QWEN2_MOE.config_names, neurons="shared_expert_intermediate_size"),
        gguf=("qwen35moe",),
    ),
    GLM4_MOE,
    variant(
        GLM4_MOE,
        "deepseek_v3",
        "DeepseekV3",
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
        config_names=names(
            GLM4_MOE.config_names, experts="n_routed_experts", head_dim="v_head_dim"
        ),
        rope_pairs="neighbours",
        gguf=("deepseek2",),
    ),
    variant(
        MIXTRAL,
        "granitemoe",
        "GraniteMoe",
        vllm_head_dim_from_hidden=True,
        mlp_modules=("block_sparse_moe",),
        experts=Experts(
            projections=within("block_sparse_moe", Experts.projections),
            router="block_sparse_moe.router",
            files=(".experts.", ".input_linear.", ".output_linear."),
        ),
        logit_divisor=SCALED.logit_divisor,
        multipliers=SCALED.multipliers,
        gguf=("granitemoe",),
    ),
    variant(
        MIXTRAL,
        "gpt_oss",
        "GptOss",
        experts=Experts(router="mlp.router", transposed=True, gives_pair=True, interleaved=True),
        # While heads are masked, attention wants a sink for each.
        per_head=("self_attn.sinks",),
        counts_heads=True,
        gguf=("gpt-oss",),
    ),
    variant(
        PLAIN,
        "llama4_text",
        "Llama4",
        vllm_backend=False,
        mlp=within("feed_forward", GATED_MLP),
        mlp_modules=("feed_forward",),
        qk_norms=("self_attn.qk_norm",),
        experts=Experts(
            projections=within("feed_forward", Experts.projections),
            router="feed_forward.router",
            shared=within("feed_forward.shared_expert", GATED_MLP),
            shared_times=1,
            transposed=True,
            weighed_first=True,
        ),
        config_names=names(
            neurons="intermediate_size_mlp",
            experts="num_local_experts",
            expert_neurons="intermediate_size",
        ),
        rope_pairs="neighbours",
        refused=GLM4_MOE.refused,
        gguf=("llama4",),
    ),
)
