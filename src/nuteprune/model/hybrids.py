"""Families whose layers are of several kinds: attention, and mixers that carry a state."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from nuteprune.model.builds import LLAMA, PLAIN, QK_NORMS
from nuteprune.model.family import CONFIG_NAMES, Projection


def mixer(module: str, *reads: str) -> tuple[Projection, ...]:
    """Return a mixer's projections: those that read the stream, and the one that writes to it."""
    return (
        *(Projection(f"{module}.{name}", ("mixer",), "hidden") for name in reads),
        Projection(f"{module}.out_proj", ("hidden",), "mixer"),
    )


QWEN3_5 = replace(
    PLAIN,
    model_type="qwen3_5_text",
    causal_lm="Qwen3_5ForCausalLM",
    attention=(
        Projection("self_attn.q_proj", ("qgate",), "hidden"),
        *LLAMA.attention[1:],
    ),
    mixer=mixer("linear_attn", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    mixer_module="linear_attn",
    vllm_backend=False,
    norm="rms_1p",
    qk_norms=QK_NORMS,
    gguf=("qwen35",),
)

HYBRIDS = (
    QWEN3_5,
    replace(
        PLAIN,
        model_type="lfm2",
        causal_lm="Lfm2ForCausalLM",
        attention=(*LLAMA.attention[:-1], Projection("self_attn.out_proj", ("hidden",), "q")),
        mixer=mixer("conv", "in_proj"),
        mixer_module="conv",
        mixer_follows_width=True,
        vllm_head_dim_from_hidden=True,
        vllm_backend=False,
        mlp=(
            Projection("feed_forward.w1", ("neurons",), "hidden"),
            Projection("feed_forward.w3", ("neurons",), "hidden"),
            Projection("feed_forward.w2", ("hidden",), "neurons"),
        ),
        mlp_modules=("feed_forward",),
        attention_norms=("operator_norm",),
        mlp_norms=("ffn_norm",),
        qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        final_norm="model.embedding_norm",
        config_names=MappingProxyType({**CONFIG_NAMES, "epsilon": "norm_eps"}),
        settles=MappingProxyType({"block_auto_adjust_ff_dim": False}),
        gguf=("lfm2",),
    ),
    replace(
        PLAIN,
        model_type="granitemoehybrid",
        causal_lm="GraniteMoeHybridForCausalLM",
        mixer=mixer("mamba", "in_proj"),
        mixer_module="mamba",
        vllm_head_dim_from_hidden=True,
        vllm_backend=False,
        mlp=(
            Projection("shared_mlp.input_linear", ("neurons", "neurons"), "hidden"),
            Projection("shared_mlp.output_linear", ("hidden",), "neurons"),
        ),
        mlp_modules=("shared_mlp",),
        logit_divisor="logits_scaling",
        multipliers=("embedding_multiplier", "residual_multiplier"),
        config_names=MappingProxyType({**CONFIG_NAMES, "neurons": "shared_intermediate_size"}),
        requires=MappingProxyType({"num_local_experts": 0}),
        refused=MappingProxyType(
            {
                "hidden": "the config class demands that the inner width of the mixers is a "
                "multiple of the hidden size, so that cannot be cut alone"
            }
        ),
        gguf=("granitehybrid", "granite", "deci"),
    ),
    replace(
        PLAIN,
        model_type="falcon_h1",
        causal_lm="FalconH1ForCausalLM",
        mixer=mixer("mamba", "in_proj"),
        mixer_module="mamba",
        vllm_backend=False,
        mlp=tuple(replace(x, path=x.path.replace("mlp.", "feed_forward.")) for x in LLAMA.mlp),
        mlp_modules=("feed_forward",),
        mlp_norms=("pre_ff_layernorm",),
        final_norm="model.final_layernorm",
        logit_multiplier="lm_head_multiplier",
        block_multipliers=("attention_out_multiplier", "mlp_multipliers.1"),
        gguf=("falcon-h1",),
    ),
)
