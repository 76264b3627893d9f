"""What the supported model types are made of: entries of hybrids and mixtures, and all by name."""

from __future__ import annotations

from nuteprune.model.dense import (
    DENSE,
    GATED_MLP,
    PLAIN,
    QK_NORMS,
    SCALED,
    attention,
    mixer,
    mlp,
    variant,
    within,
)
from nuteprune.model.family import CONFIG_NAMES, Experts, Family, Projection

QWEN3_5 = variant(
    PLAIN,
    "qwen3_5_text",
    attention=(Projection("self_attn.q_proj", ("qgate",), "hidden"), *attention()[1:]),
    mixer=mixer("linear_attn", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    norm="rms_1p",
    qk_norms=QK_NORMS,
    gguf=("qwen35",),
)

HYBRIDS = (
    QWEN3_5,
    variant(
        PLAIN,
        "lfm2",
        attention=attention("out_proj"),
        mixer=mixer("conv", "in_proj"),
        mixer_follows_width=True,
        vllm_head_dim_from_hidden=True,
        mlp=mlp("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
        mlp_modules=("feed_forward",),
        attention_norms=("operator_norm",),
        mlp_norms=("ffn_norm",),
        qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        final_norm="model.embedding_norm",
        config_names={**CONFIG_NAMES, "epsilon": "norm_eps"},
        settles={"block_auto_adjust_ff_dim": False},
        gguf=("lfm2",),
    ),
    variant(
        SCALED,
        "granitemoehybrid",
        mixer=mixer("mamba", "in_proj"),
        vllm_head_dim_from_hidden=True,
        mlp=mlp("shared_mlp.input_linear", "shared_mlp.output_linear", fused=2),
        mlp_modules=("shared_mlp",),
        config_names={**CONFIG_NAMES, "neurons": "shared_intermediate_size"},
        requires={"num_local_experts": 0},
        refused={
            "hidden": "the config class demands that the inner width of the mixers is a "
            "multiple of the hidden size, so that cannot be cut alone"
        },
        gguf=("granitehybrid", "granite", "deci"),
    ),
    variant(
        PLAIN,
        "falcon_h1",
        mixer=mixer("mamba", "in_proj"),
        mlp=within("feed_forward", GATED_MLP),
        mlp_modules=("feed_forward",),
        mlp_norms=("pre_ff_layernorm",),
        final_norm="model.final_layernorm",
        logit_multiplier="lm_head_multiplier",
        block_multipliers=("attention_out_multiplier", "mlp_multipliers.1"),
        gguf=("falcon-h1",),
    ),
)

_EXPERTS = {
    **{k: v for k, v in CONFIG_NAMES.items() if k != "neurons"},
    "experts": "num_local_experts",
    "expert_neurons": "intermediate_size",
}
"""Names in the config of a mixture whose layers all have experts."""
_ALL_EXPERTS = {"neurons": "all of its neurons are those of experts; use --gates expert_neurons"}
_SHARED_WIDTH = "the stock class makes shared experts as wide as routed ones; use --shapes free"

MIXTRAL = variant(
    PLAIN,
    "mixtral",
    experts=Experts(),
    config_names=_EXPERTS,
    refused=_ALL_EXPERTS,
    gguf=("llama, experts",),
)

QWEN3_MOE = variant(
    PLAIN,
    "qwen3_moe",
    qk_norms=QK_NORMS,
    experts=Experts(count_in_4="num_experts"),
    config_names={
        **CONFIG_NAMES,
        "experts": "num_local_experts",
        "expert_neurons": "moe_intermediate_size",
    },
    gguf=("qwen3moe",),
)

QWEN2_MOE = variant(
    QWEN3_MOE,
    "qwen2_moe",
    vllm_head_dim_from_hidden=True,
    qk_norms=(),
    experts=Experts(
        shared=within("mlp.shared_expert", GATED_MLP), shared_gate="mlp.shared_expert_gate"
    ),
    config_names={
        **QWEN3_MOE.config_names,
        "experts": "num_experts",
        "shared_neurons": "shared_expert_intermediate_size",
    },
    gguf=("qwen2moe",),
)

GLM4_MOE = variant(
    QWEN3_MOE,
    "glm4_moe",
    experts=Experts(
        shared=within("mlp.shared_experts", GATED_MLP),
        shared_times="n_shared_experts",
        groups="n_group",
    ),
    buffers=("mlp.gate.e_score_correction_bias",),
    gguf=("glm4moe",),
    refused={"neurons uniform": _SHARED_WIDTH, "expert_neurons uniform": _SHARED_WIDTH},
)

MIXTURES = (
    MIXTRAL,
    variant(
        MIXTRAL,
        "olmoe",
        qk_norms=QK_NORMS,
        joint_qk_norms=True,
        counts_heads=True,
        config_names={**_EXPERTS, "experts": "num_experts"},
        attention_clip="clip_qkv",
        gguf=("olmoe",),
        refused={
            **_ALL_EXPERTS,
            "hidden": "its norms of queries and keys are as wide as the model",
        },
    ),
    QWEN3_MOE,
    QWEN2_MOE,
    variant(
        QWEN3_5,
        "qwen3_next",
        mixer=mixer("linear_attn", "in_proj_qkvz", "in_proj_ba"),
        experts=QWEN2_MOE.experts,
        config_names=QWEN2_MOE.config_names,
        gguf=("qwen3next",),
    ),
    variant(
        QWEN3_5,
        "qwen3_5_moe_text",
        experts=QWEN2_MOE.experts,
        # No layer is without experts, so neurons are those of shared ones.
        config_names={**QWEN2_MOE.config_names, "neurons": "shared_expert_intermediate_size"},
        gguf=("qwen35moe",),
    ),
    GLM4_MOE,
    variant(
        GLM4_MOE,
        "deepseek_v3",
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
        latent_norms=("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
        config_names={
            **GLM4_MOE.config_names,
            "experts": "n_routed_experts",
            "head_dim": "v_head_dim",
        },
        rope_pairs="neighbours",
        gguf=("deepseek2",),
    ),
    variant(
        MIXTRAL,
        "granitemoe",
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
        experts=Experts(router="mlp.router", transposed=True, gives_pair=True, interleaved=True),
        # While heads are masked, attention wants a sink for each.
        per_head=("self_attn.sinks",),
        counts_heads=True,
        gguf=("gpt-oss",),
    ),
    variant(
        PLAIN,
        "llama4_text",
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
        config_names={**_EXPERTS, "neurons": "intermediate_size_mlp"},
        rope_pairs="neighbours",
        refused=GLM4_MOE.refused,
        gguf=("llama4",),
    ),
)

FAMILIES: dict[str, Family] = {x.model_type: x for x in (*DENSE, *MIXTURES, *HYBRIDS)}
