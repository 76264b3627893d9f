"""What the supported model types are made of: frozen data, one short entry per family."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from nuteprune.model.builds import (
    FUSED_MLP,
    GEMMA2,
    GLM,
    LAYER_NORM,
    LLAMA,
    OLMO2,
    PLAIN,
    PLAIN_MLP,
    POST_NORM,
    QK_NORMS,
    SHARED_NORM,
)
from nuteprune.model.family import Family, Projection
from nuteprune.model.hybrids import HYBRIDS
from nuteprune.model.mixtures import MIXTURES

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        replace(PLAIN, model_type="mistral", causal_lm="MistralForCausalLM"),
        replace(
            PLAIN,
            model_type="qwen2",
            causal_lm="Qwen2ForCausalLM",
            vllm_head_dim_from_hidden=True,
            gguf=("qwen2", "llama", "deci"),
        ),
        replace(
            PLAIN,
            model_type="qwen3",
            causal_lm="Qwen3ForCausalLM",
            qk_norms=QK_NORMS,
            gguf=("qwen3", "openelm"),
        ),
        replace(
            PLAIN,
            model_type="phi3",
            causal_lm="Phi3ForCausalLM",
            counts_heads=True,
            attention=(
                Projection("self_attn.qkv_proj", ("q", "kv", "kv"), "hidden"),
                Projection("self_attn.o_proj", ("hidden",), "q"),
            ),
            mlp=FUSED_MLP,
            gguf=("phi3", "llama", "deci"),
        ),
        GEMMA2,
        replace(
            GEMMA2,
            model_type="gemma3_text",
            causal_lm="Gemma3ForCausalLM",
            qk_norms=QK_NORMS,
            gguf=("gemma3",),
        ),
        replace(
            PLAIN,
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
        replace(PLAIN, model_type="smollm3", causal_lm="SmolLM3ForCausalLM", gguf=("smollm3",)),
        replace(PLAIN, model_type="seed_oss", causal_lm="SeedOssForCausalLM"),
        replace(
            PLAIN,
            model_type="ernie4_5",
            causal_lm="Ernie4_5ForCausalLM",
            gguf=("llama", "deci"),
            rope_pairs="neighbours",
        ),
        replace(PLAIN, model_type="ministral", causal_lm="MinistralForCausalLM"),
        replace(PLAIN, model_type="ministral3", causal_lm="Ministral3ForCausalLM", gguf=()),
        replace(
            PLAIN,
            model_type="hunyuan_v1_dense",
            causal_lm="HunYuanDenseV1ForCausalLM",
            qk_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"),
            gguf=("hunyuan-dense",),
        ),
        replace(
            LLAMA,
            model_type="arcee",
            causal_lm="ArceeForCausalLM",
            mlp=PLAIN_MLP,
            gguf=("arcee",),
        ),
        replace(
            PLAIN,
            model_type="apertus",
            causal_lm="ApertusForCausalLM",
            mlp=PLAIN_MLP,
            attention_norms=("attention_layernorm",),
            mlp_norms=("feedforward_layernorm",),
            qk_norms=QK_NORMS,
            buffers=("mlp.act_fn.beta", "mlp.act_fn.eps"),
            gguf=(),
        ),
        replace(
            PLAIN,
            model_type="gemma",
            causal_lm="GemmaForCausalLM",
            norm="rms_1p",
            scaled_embedding=True,
            gguf=("gemma",),
        ),
        replace(
            GEMMA2,
            model_type="vaultgemma",
            causal_lm="VaultGemmaForCausalLM",
            attention_norms=("input_layernorm",),
            mlp_norms=("pre_feedforward_layernorm",),
            post_norms=None,
            gguf=(),
        ),
        GLM,
        replace(
            GLM,
            model_type="glm4",
            causal_lm="Glm4ForCausalLM",
            attention_norms=("input_layernorm", "post_self_attn_layernorm"),
            mlp_norms=("post_attention_layernorm", "post_mlp_layernorm"),
            post_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
            gguf=("glm4",),
        ),
        replace(POST_NORM, model_type="exaone4", causal_lm="Exaone4ForCausalLM", gguf=("exaone4",)),
        replace(OLMO2, model_type="olmo2", causal_lm="Olmo2ForCausalLM", gguf=("olmo2",)),
        replace(OLMO2, model_type="olmo3", causal_lm="Olmo3ForCausalLM"),
        replace(
            PLAIN,
            model_type="helium",
            causal_lm="HeliumForCausalLM",
            heads_fill_width=True,
            gguf=("llama", "deci"),
            rope_pairs="neighbours",
        ),
        replace(
            LAYER_NORM,
            model_type="starcoder2",
            causal_lm="Starcoder2ForCausalLM",
            mlp=(
                Projection("mlp.c_fc", ("neurons",), "hidden"),
                Projection("mlp.c_proj", ("hidden",), "neurons"),
            ),
            gguf=("starcoder2",),
        ),
        replace(
            LAYER_NORM,
            model_type="nemotron",
            causal_lm="NemotronForCausalLM",
            mlp=PLAIN_MLP,
            gguf=("nemotron",),
            norm="layer_1p",
        ),
        replace(
            LAYER_NORM,
            model_type="olmo",
            causal_lm="OlmoForCausalLM",
            attention_clip="clip_qkv",
            gguf=("olmo",),
        ),
        replace(
            LAYER_NORM,
            model_type="stablelm",
            causal_lm="StableLmForCausalLM",
            counts_heads=True,
            head_dim_from_hidden=True,
            heads_divide_hidden=True,
            requires=MappingProxyType({"qk_layernorm": False, "use_parallel_residual": False}),
            gguf=("stablelm",),
        ),
        replace(
            SHARED_NORM,
            model_type="phi",
            causal_lm="PhiForCausalLM",
            attention=(*LLAMA.attention[:-1], Projection("self_attn.dense", ("hidden",), "q")),
            mlp=(
                Projection("mlp.fc1", ("neurons",), "hidden"),
                Projection("mlp.fc2", ("hidden",), "neurons"),
            ),
            final_norm="model.final_layernorm",
            requires=MappingProxyType({"qk_layernorm": False}),
            gguf=("phi2",),
        ),
        replace(
            SHARED_NORM,
            model_type="cohere",
            causal_lm="CohereForCausalLM",
            logit_multiplier="logit_scale",
            requires=MappingProxyType({"use_qk_norm": False}),
            gguf=("command-r",),
            rope_pairs="neighbours",
        ),
        replace(
            SHARED_NORM,
            model_type="cohere2",
            causal_lm="Cohere2ForCausalLM",
            logit_multiplier="logit_scale",
            gguf=("cohere2",),
            rope_pairs="neighbours",
        ),
        *MIXTURES,
        *HYBRIDS,
    )
}
