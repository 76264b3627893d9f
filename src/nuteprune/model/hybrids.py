"""Families whose layers are of several kinds: attention, and mixers that carry a state."""

from __future__ import annotations

from types import MappingProxyType

from nuteprune.model.builds import (
    GATED_MLP,
    PLAIN,
    QK_NORMS,
    SCALED,
    attention,
    mixer,
    mlp,
    names,
    variant,
    within,
)
from nuteprune.model.family import Projection

QWEN3_5 = variant(
    PLAIN,
    "qwen3_5_text",
    "Qwen3_5",
    attention=(Projection("self_attn.q_proj", ("qgate",), "hidden"), *attention()[1:]),
    mixer=mixer("linear_attn", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    mixer_module="linear_attn",
    vllm_backend=False,
    norm="rms_1p",
    qk_norms=QK_NORMS,
    gguf=("qwen35",),
)

HYBRIDS = (
    QWEN3_5,
    variant(
        PLAIN,
        "lfm2",
        "Lfm2",
        attention=attention("out_proj"),
        mixer=mixer("conv", "in_proj"),
        mixer_module="conv",
        mixer_follows_width=True,
        vllm_head_dim_from_hidden=True,
        vllm_backend=False,
        mlp=mlp("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
        mlp_modules=("feed_forward",),
        attention_norms=("operator_norm",),
        mlp_norms=("ffn_norm",),
        qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        final_norm="model.embedding_norm",
        config_names=names(epsilon="norm_eps"),
        settles=MappingProxyType({"block_auto_adjust_ff_dim": False}),
        gguf=("lfm2",),
    ),
    variant(
        SCALED,
        "granitemoehybrid",
        "GraniteMoeHybrid",
        mixer=mixer("mamba", "in_proj"),
        mixer_module="mamba",
        vllm_head_dim_from_hidden=True,
        vllm_backend=False,
        mlp=mlp("shared_mlp.input_linear", "shared_mlp.output_linear", fused=2),
        mlp_modules=("shared_mlp",),
        config_names=names(neurons="shared_intermediate_size"),
        requires=MappingProxyType({"num_local_experts": 0}),
        refused=MappingProxyType(
            {
                "hidden": "the config class demands that the inner width of the mixers is a "
                "multiple of the hidden size, so that cannot be cut alone"
            }
        ),
        gguf=("granitehybrid", "granite", "deci"),
    ),
    variant(
        PLAIN,
        "falcon_h1",
        "FalconH1",
        mixer=mixer("mamba", "in_proj"),
        mixer_module="mamba",
        vllm_backend=False,
        mlp=within("feed_forward", GATED_MLP),
        mlp_modules=("feed_forward",),
        mlp_norms=("pre_ff_layernorm",),
        final_norm="model.final_layernorm",
        logit_multiplier="lm_head_multiplier",
        block_multipliers=("attention_out_multiplier", "mlp_multipliers.1"),
        gguf=("falcon-h1",),
    ),
)
