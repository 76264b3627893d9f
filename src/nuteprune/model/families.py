"""What the supported model types are made of: frozen data, one short entry per family."""

from __future__ import annotations

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
    SCALED,
    SHARED_NORM,
    attention,
    mlp,
    names,
    variant,
)
from nuteprune.model.family import Family, Projection
from nuteprune.model.hybrids import HYBRIDS
from nuteprune.model.mixtures import MIXTURES

UNGROUPED = MappingProxyType(
    {"heads": "num_attention_heads", "neurons": "intermediate_size", "hidden": "hidden_size"}
)
"""Names in a config without KV heads."""

DENSE = (
    LLAMA,
    variant(PLAIN, "mistral", "Mistral"),
    variant(
        PLAIN, "qwen2", "Qwen2", vllm_head_dim_from_hidden=True, gguf=("qwen2", "llama", "deci")
    ),
    variant(PLAIN, "qwen3", "Qwen3", qk_norms=QK_NORMS, gguf=("qwen3", "openelm")),
    variant(
        PLAIN,
        "phi3",
        "Phi3",
        counts_heads=True,
        attention=(
            Projection("self_attn.qkv_proj", ("q", "kv", "kv"), "hidden"),
            Projection("self_attn.o_proj", ("hidden",), "q"),
        ),
        mlp=FUSED_MLP,
        gguf=("phi3", "llama", "deci"),
    ),
    GEMMA2,
    variant(GEMMA2, "gemma3_text", "Gemma3", qk_norms=QK_NORMS, gguf=("gemma3",)),
    variant(SCALED, "granite", "Granite", gguf=("granite", "deci")),
    variant(
        LAYER_NORM,
        "gpt_neox",
        "GPTNeoX",
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attention=(
            Projection("attention.query_key_value", ("qkv",), "hidden"),
            Projection("attention.dense", ("hidden",), "q"),
        ),
        mlp=mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        attention_module="attention",
        head_dim_from_hidden=True,
        heads_divide_hidden=True,
        config_names=UNGROUPED,
        rope_names=MappingProxyType(
            {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        ),
        gguf=("gptneox",),
    ),
    variant(
        LAYER_NORM,
        "opt",
        "OPT",
        layers="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        attention=attention("out_proj"),
        mlp=mlp("fc1", "fc2"),
        attention_norms=("self_attn_layer_norm",),
        mlp_norms=("final_layer_norm",),
        mlp_modules=("fc1", "fc2"),
        counts_heads=True,
        head_dim_from_hidden=True,
        heads_divide_hidden=True,
        config_names=names(UNGROUPED, neurons="ffn_dim"),
        requires=MappingProxyType({"do_layer_norm_before": True}),
        activation="activation_function",
    ),
    variant(PLAIN, "smollm3", "SmolLM3", gguf=("smollm3",)),
    variant(PLAIN, "seed_oss", "SeedOss"),
    variant(PLAIN, "ernie4_5", "Ernie4_5", rope_pairs="neighbours"),
    variant(PLAIN, "ministral", "Ministral"),
    variant(PLAIN, "ministral3", "Ministral3", gguf=()),
    variant(
        PLAIN,
        "hunyuan_v1_dense",
        "HunYuanDenseV1",
        qk_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"),
        gguf=("hunyuan-dense",),
    ),
    variant(LLAMA, "arcee", "Arcee", mlp=PLAIN_MLP, gguf=("arcee",)),
    variant(
        PLAIN,
        "apertus",
        "Apertus",
        mlp=PLAIN_MLP,
        attention_norms=("attention_layernorm",),
        mlp_norms=("feedforward_layernorm",),
        qk_norms=QK_NORMS,
        buffers=("mlp.act_fn.beta", "mlp.act_fn.eps"),
        gguf=(),
    ),
    variant(PLAIN, "gemma", "Gemma", norm="rms_1p", scaled_embedding=True, gguf=("gemma",)),
    variant(
        GEMMA2,
        "vaultgemma",
        "VaultGemma",
        attention_norms=("input_layernorm",),
        mlp_norms=("pre_feedforward_layernorm",),
        post_norms=None,
        gguf=(),
    ),
    GLM,
    variant(
        GLM,
        "glm4",
        "Glm4",
        attention_norms=("input_layernorm", "post_self_attn_layernorm"),
        mlp_norms=("post_attention_layernorm", "post_mlp_layernorm"),
        post_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
        gguf=("glm4",),
    ),
    variant(POST_NORM, "exaone4", "Exaone4", gguf=("exaone4",)),
    variant(OLMO2, "olmo2", "Olmo2", gguf=("olmo2",)),
    variant(OLMO2, "olmo3", "Olmo3"),
    variant(PLAIN, "helium", "Helium", heads_fill_width=True, rope_pairs="neighbours"),
    variant(
        LAYER_NORM,
        "starcoder2",
        "Starcoder2",
        mlp=mlp("mlp.c_fc", "mlp.c_proj"),
        gguf=("starcoder2",),
    ),
    variant(LAYER_NORM, "nemotron", "Nemotron", mlp=PLAIN_MLP, norm="layer_1p", gguf=("nemotron",)),
    variant(LAYER_NORM, "olmo", "Olmo", attention_clip="clip_qkv", gguf=("olmo",)),
    variant(
        LAYER_NORM,
        "stablelm",
        "StableLm",
        counts_heads=True,
        head_dim_from_hidden=True,
        heads_divide_hidden=True,
        requires=MappingProxyType({"qk_layernorm": False, "use_parallel_residual": False}),
        gguf=("stablelm",),
    ),
    variant(
        SHARED_NORM,
        "phi",
        "Phi",
        attention=attention("dense"),
        mlp=mlp("mlp.fc1", "mlp.fc2"),
        final_norm="model.final_layernorm",
        requires=MappingProxyType({"qk_layernorm": False}),
        gguf=("phi2",),
    ),
    variant(
        SHARED_NORM,
        "cohere",
        "Cohere",
        logit_multiplier="logit_scale",
        requires=MappingProxyType({"use_qk_norm": False}),
        gguf=("command-r",),
        rope_pairs="neighbours",
    ),
    variant(
        SHARED_NORM,
        "cohere2",
        "Cohere2",
        logit_multiplier="logit_scale",
        gguf=("cohere2",),
        rope_pairs="neighbours",
    ),
)

FAMILIES: dict[str, Family] = {x.model_type: x for x in (*DENSE, *MIXTURES, *HYBRIDS)}
