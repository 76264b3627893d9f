"""What the supported model types are made of: frozen data, one short entry per family."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from nuteprune.model.family import CONFIG_NAMES, Family, Projection

_GATED_MLP = (
    Projection("mlp.gate_proj", ("neurons",), "hidden"),
    Projection("mlp.up_proj", ("neurons",), "hidden"),
    Projection("mlp.down_proj", ("hidden",), "neurons"),
)

_FUSED_MLP = (
    Projection("mlp.gate_up_proj", ("neurons", "neurons"), "hidden"),
    Projection("mlp.down_proj", ("hidden",), "neurons"),
)

_PLAIN_MLP = (
    Projection("mlp.up_proj", ("neurons",), "hidden"),
    Projection("mlp.down_proj", ("hidden",), "neurons"),
)

_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

_LLAMA = Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    attention=(
        Projection("self_attn.q_proj", ("q",), "hidden"),
        Projection("self_attn.k_proj", ("kv",), "hidden"),
        Projection("self_attn.v_proj", ("kv",), "hidden"),
        Projection("self_attn.o_proj", ("hidden",), "q"),
    ),
    mlp=_GATED_MLP,
    heads_divide_hidden=True,
    gguf=("llama", "deci"),
)

_PLAIN = replace(_LLAMA, heads_divide_hidden=False)
"""What LLaMA is, but for its config's demand on heads."""

_GEMMA2 = replace(
    _LLAMA,
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

_GLM = replace(_PLAIN, model_type="glm", causal_lm="GlmForCausalLM", mlp=_FUSED_MLP, gguf=())

_POST_NORM = replace(
    _PLAIN,
    attention_norms=("post_attention_layernorm",),
    mlp_norms=("post_feedforward_layernorm",),
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    qk_norms=_QK_NORMS,
    gguf=(),
)
"""Blocks read the residual stream as it is; what they write is normed."""

_OLMO2 = replace(_POST_NORM, joint_qk_norms=True, counts_heads=True)

_LAYER_NORM = replace(
    _PLAIN,
    norm="layer",
    config_names=MappingProxyType({k: v for k, v in CONFIG_NAMES.items() if k != "epsilon"}),
    gguf=(),
)

_SHARED_NORM = replace(
    _LAYER_NORM, attention_norms=(), mlp_norms=(), shared_norms=("input_layernorm",)
)
"""Both blocks read one norm, side by side."""

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _LLAMA,
        replace(_PLAIN, model_type="mistral", causal_lm="MistralForCausalLM"),
        replace(
            _PLAIN,
            model_type="qwen2",
            causal_lm="Qwen2ForCausalLM",
            vllm_head_dim_from_hidden=True,
            gguf=("qwen2", "llama", "deci"),
        ),
        replace(
            _PLAIN,
            model_type="qwen3",
            causal_lm="Qwen3ForCausalLM",
            qk_norms=_QK_NORMS,
            gguf=("qwen3", "openelm"),
        ),
        replace(
            _PLAIN,
            model_type="phi3",
            causal_lm="Phi3ForCausalLM",
            counts_heads=True,
            attention=(
                Projection("self_attn.qkv_proj", ("q", "kv", "kv"), "hidden"),
                Projection("self_attn.o_proj", ("hidden",), "q"),
            ),
            mlp=_FUSED_MLP,
            gguf=("phi3", "llama", "deci"),
        ),
        _GEMMA2,
        replace(
            _GEMMA2,
            model_type="gemma3_text",
            causal_lm="Gemma3ForCausalLM",
            qk_norms=_QK_NORMS,
            gguf=("gemma3",),
        ),
        replace(
            _PLAIN,
            model_type="granite",
            causal_lm="GraniteForCausalLM",
            logit_divisor="logits_scaling",
            multipliers=("embedding_multiplier", "residual_multiplier"),
            gguf=("granite", "deci"),
        ),
        Family(
            model_type="gpt_neox",
            causal_lm="GPTNeoXForCausalLM",
            layers="gpt_neox.layers",
            embedding="gpt_neox.embed_in",
            final_norm="gpt_neox.final_layer_norm",
            norm="layer",
            attention=(
                Projection("attention.query_key_value", ("qkv",), "hidden"),
                Projection("attention.dense", ("hidden",), "q"),
            ),
            mlp=(
                Projection("mlp.dense_h_to_4h", ("neurons",), "hidden"),
                Projection("mlp.dense_4h_to_h", ("hidden",), "neurons"),
            ),
            attention_module="attention",
            head_dim_from_hidden=True,
            heads_divide_hidden=True,
            config_names=MappingProxyType(
                {
                    "heads": "num_attention_heads",
                    "neurons": "intermediate_size",
                    "hidden": "hidden_size",
                }
            ),
            rope_names=MappingProxyType(
                {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
            ),
            gguf=("gptneox",),
        ),
        Family(
            model_type="opt",
            causal_lm="OPTForCausalLM",
            layers="model.decoder.layers",
            embedding="model.decoder.embed_tokens",
            final_norm="model.decoder.final_layer_norm",
            norm="layer",
            attention=(
                Projection("self_attn.q_proj", ("q",), "hidden"),
                Projection("self_attn.k_proj", ("kv",), "hidden"),
                Projection("self_attn.v_proj", ("kv",), "hidden"),
                Projection("self_attn.out_proj", ("hidden",), "q"),
            ),
            mlp=(
                Projection("fc1", ("neurons",), "hidden"),
                Projection("fc2", ("hidden",), "neurons"),
            ),
            attention_norms=("self_attn_layer_norm",),
            mlp_norms=("final_layer_norm",),
            mlp_modules=("fc1", "fc2"),
            counts_heads=True,
            head_dim_from_hidden=True,
            heads_divide_hidden=True,
            config_names=MappingProxyType(
                {"heads": "num_attention_heads", "neurons": "ffn_dim", "hidden": "hidden_size"}
            ),
            requires=MappingProxyType({"do_layer_norm_before": True}),
            activation="activation_function",
        ),
        replace(_PLAIN, model_type="smollm3", causal_lm="SmolLM3ForCausalLM", gguf=()),
        replace(_PLAIN, model_type="seed_oss", causal_lm="SeedOssForCausalLM"),
        replace(_PLAIN, model_type="ernie4_5", causal_lm="Ernie4_5ForCausalLM", gguf=()),
        replace(_PLAIN, model_type="ministral", causal_lm="MinistralForCausalLM"),
        replace(_PLAIN, model_type="ministral3", causal_lm="Ministral3ForCausalLM", gguf=()),
        replace(
            _PLAIN,
            model_type="hunyuan_v1_dense",
            causal_lm="HunYuanDenseV1ForCausalLM",
            qk_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"),
            gguf=(),
        ),
        replace(_LLAMA, model_type="arcee", causal_lm="ArceeForCausalLM", mlp=_PLAIN_MLP, gguf=()),
        replace(
            _PLAIN,
            model_type="apertus",
            causal_lm="ApertusForCausalLM",
            mlp=_PLAIN_MLP,
            attention_norms=("attention_layernorm",),
            mlp_norms=("feedforward_layernorm",),
            qk_norms=_QK_NORMS,
            buffers=("mlp.act_fn.beta", "mlp.act_fn.eps"),
            gguf=(),
        ),
        replace(
            _PLAIN,
            model_type="gemma",
            causal_lm="GemmaForCausalLM",
            norm="rms_1p",
            scaled_embedding=True,
            gguf=(),
        ),
        replace(
            _GEMMA2,
            model_type="vaultgemma",
            causal_lm="VaultGemmaForCausalLM",
            attention_norms=("input_layernorm",),
            mlp_norms=("pre_feedforward_layernorm",),
            post_norms=None,
            gguf=(),
        ),
        _GLM,
        replace(
            _GLM,
            model_type="glm4",
            causal_lm="Glm4ForCausalLM",
            attention_norms=("input_layernorm", "post_self_attn_layernorm"),
            mlp_norms=("post_attention_layernorm", "post_mlp_layernorm"),
            post_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
        ),
        replace(_POST_NORM, model_type="exaone4", causal_lm="Exaone4ForCausalLM"),
        replace(_OLMO2, model_type="olmo2", causal_lm="Olmo2ForCausalLM"),
        replace(_OLMO2, model_type="olmo3", causal_lm="Olmo3ForCausalLM"),
        replace(
            _PLAIN,
            model_type="helium",
            causal_lm="HeliumForCausalLM",
            heads_fill_width=True,
            gguf=(),
        ),
        replace(
            _LAYER_NORM,
            model_type="starcoder2",
            causal_lm="Starcoder2ForCausalLM",
            mlp=(
                Projection("mlp.c_fc", ("neurons",), "hidden"),
                Projection("mlp.c_proj", ("hidden",), "neurons"),
            ),
        ),
        replace(
            _LAYER_NORM,
            model_type="nemotron",
            causal_lm="NemotronForCausalLM",
            mlp=_PLAIN_MLP,
        ),
        replace(_LAYER_NORM, model_type="olmo", causal_lm="OlmoForCausalLM"),
        replace(
            _LAYER_NORM,
            model_type="stablelm",
            causal_lm="StableLmForCausalLM",
            counts_heads=True,
            head_dim_from_hidden=True,
            heads_divide_hidden=True,
            requires=MappingProxyType({"qk_layernorm": False, "use_parallel_residual": False}),
        ),
        replace(
            _SHARED_NORM,
            model_type="phi",
            causal_lm="PhiForCausalLM",
            attention=(
                *_LLAMA.attention[:-1],
                Projection("self_attn.dense", ("hidden",), "q"),
            ),
            mlp=(
                Projection("mlp.fc1", ("neurons",), "hidden"),
                Projection("mlp.fc2", ("hidden",), "neurons"),
            ),
            final_norm="model.final_layernorm",
            requires=MappingProxyType({"qk_layernorm": False}),
        ),
        replace(
            _SHARED_NORM,
            model_type="cohere",
            causal_lm="CohereForCausalLM",
            logit_multiplier="logit_scale",
            requires=MappingProxyType({"use_qk_norm": False}),
        ),
        replace(
            _SHARED_NORM,
            model_type="cohere2",
            causal_lm="Cohere2ForCausalLM",
            logit_multiplier="logit_scale",
        ),
    )
}
