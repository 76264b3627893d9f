"""Mixtures of experts: frozen data, one short entry per family."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from nuteprune.model.builds import GATED_MLP, PLAIN, QK_NORMS
from nuteprune.model.family import CONFIG_NAMES, EXPERT_NAMES, Experts, Projection

_ALL_EXPERTS = MappingProxyType(
    {"neurons": "all of its neurons are those of experts; use --gates expert_neurons"}
)
_SHARED_WIDTH = (
    "the stock class makes the shared expert as wide as the routed ones; use --shapes free"
)


def _within(module: str) -> tuple[Projection, ...]:
    """Return a gated MLP's projections, of a shared expert in the MLP."""
    return tuple(replace(x, path=x.path.replace("mlp.", f"mlp.{module}.")) for x in GATED_MLP)


MIXTRAL = replace(
    PLAIN,
    model_type="mixtral",
    causal_lm="MixtralForCausalLM",
    mlp=GATED_MLP,
    experts=Experts(),
    config_names=EXPERT_NAMES,
    refused=_ALL_EXPERTS,
    gguf=(),
)

QWEN3_MOE = replace(
    PLAIN,
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    qk_norms=QK_NORMS,
    experts=Experts(),
    config_names=MappingProxyType(
        {
            **CONFIG_NAMES,
            "experts": "num_local_experts",
            "expert_neurons": "moe_intermediate_size",
        }
    ),
    gguf=(),
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
        refused=MappingProxyType(
            {**_ALL_EXPERTS, "hidden": "its norms of queries and keys are as wide as the model"}
        ),
    ),
    QWEN3_MOE,
    replace(
        QWEN3_MOE,
        model_type="qwen2_moe",
        causal_lm="Qwen2MoeForCausalLM",
        qk_norms=(),
        experts=Experts(shared=_within("shared_expert"), shared_gate="mlp.shared_expert_gate"),
        config_names=MappingProxyType(
            {
                **QWEN3_MOE.config_names,
                "experts": "num_experts",
                "shared_neurons": "shared_expert_intermediate_size",
            }
        ),
    ),
    replace(
        QWEN3_MOE,
        model_type="glm4_moe",
        causal_lm="Glm4MoeForCausalLM",
        experts=Experts(shared=_within("shared_experts"), shared_times="n_shared_experts"),
        buffers=("mlp.gate.e_score_correction_bias",),
        requires=MappingProxyType({"n_group": 1}),
        refused=MappingProxyType(
            {"neurons uniform": _SHARED_WIDTH, "expert_neurons uniform": _SHARED_WIDTH}
        ),
    ),
    replace(
        MIXTRAL,
        model_type="granitemoe",
        causal_lm="GraniteMoeForCausalLM",
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
    ),
    replace(
        MIXTRAL,
        model_type="gpt_oss",
        causal_lm="GptOssForCausalLM",
        experts=Experts(router="mlp.router", transposed=True, interleaved=True),
        refused=MappingProxyType(
            {
                **_ALL_EXPERTS,
                "heads": "each of its heads has an attention sink, which no gate cuts yet",
                "kv_groups": "each of its heads has an attention sink, which no gate cuts yet",
            }
        ),
    ),
)
