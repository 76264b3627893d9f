"""Dense families: frozen data, one short entry per family, made of what many have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nuteprune.model.family import CONFIG_NAMES, Family, Projection


def variant(base: Family, model_type: str, **facts: Any) -> Family:
    """Return the entry of a model type that differs from another in some facts.

    Args:
        base: the other's entry.
        model_type: its name in configs.
        **facts: what differs.
    """
    causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return replace(base, model_type=model_type, causal_lm=causal_lm, **facts)


def attention(output: str = "o_proj") -> tuple[Projection, ...]:
    """Return attention's projections by the name of the one that writes to the stream."""
    return (
        Projection("self_attn.q_proj", ("q",), "hidden"),
        Projection("self_attn.k_proj", ("kv",), "hidden"),
        Projection("self_attn.v_proj", ("kv",), "hidden"),
        Projection(f"self_attn.{output}", ("hidden",), "q"),
    )


def mlp(*paths: str, fused: int = 1) -> tuple[Projection, ...]:
    """Return an MLP's projections by their paths; the last one writes to the stream.

    Args:
        *paths: of the projections, below the layer.
        fused: how many values of each neuron those make that read the stream.
    """
    return _block(paths, "neurons", fused)


def mixer(module: str, *reads: str) -> tuple[Projection, ...]:
    """Return a mixer's projections by the names of those that read the stream."""
    return _block([f"{module}.{name}" for name in (*reads, "out_proj")], "mixer")


def _block(paths: Iterable[str], axis: str, fused: int = 1) -> tuple[Projection, ...]:
    *reads, writes = paths
    readers = (Projection(path, (axis,) * fused, "hidden") for path in reads)
    return (*readers, Projection(writes, ("hidden",), axis))


def within(module: str, projections: Iterable[Projection]) -> tuple[Projection, ...]:
    """Return an MLP's projections where they are of another module."""
    return tuple(replace(x, path=x.path.replace("mlp.", f"{module}.", 1)) for x in projections)


GATED_MLP = mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FUSED_MLP = mlp("mlp.gate_up_proj", "mlp.down_proj", fused=2)
PLAIN_MLP = mlp("mlp.up_proj", "mlp.down_proj")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

LLAMA = Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    attention=attention(),
    mlp=GATED_MLP,
    heads_divide_hidden=True,
    gguf=("llama", "deci"),
)

PLAIN = replace(LLAMA, heads_divide_hidden=False)
"""All facts of LLaMA except its config's demand on heads."""

GEMMA2 = variant(
    LLAMA,
    "gemma2",
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

GLM = variant(PLAIN, "glm", mlp=FUSED_MLP, gguf=("chatglm",), rope_pairs="neighbours")

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
    config_names={k: v for k, v in CONFIG_NAMES.items() if k != "epsilon"},
    gguf=(),
)

SHARED_NORM = replace(
    LAYER_NORM, attention_norms=(), mlp_norms=(), shared_norms=("input_layernorm",)
)
"""Both blocks read one norm, side by side."""

COHERE = replace(SHARED_NORM, logit_multiplier="logit_scale", rope_pairs="neighbours")

SCALED = replace(
    PLAIN,
    logit_divisor="logits_scaling",
    multipliers=("embedding_multiplier", "residual_multiplier"),
)
"""The config multiplies embeddings and what blocks write, and divides logits."""

UNGROUPED = {k: CONFIG_NAMES[k] for k in ("heads", "neurons", "hidden")}
"""Names in a config without KV heads."""

DENSE = (
    LLAMA,
    variant(PLAIN, "mistral"),
    variant(PLAIN, "qwen2", vllm_head_dim_from_hidden=True, gguf=("qwen2", "llama", "deci")),
    variant(PLAIN, "qwen3", qk_norms=QK_NORMS, gguf=("qwen3", "openelm")),
    variant(
        PLAIN,
        "phi3",
        counts_heads=True,
        attention=(
            Projection("self_attn.qkv_proj", ("q", "kv", "kv"), "hidden"),
            Projection("self_attn.o_proj", ("hidden",), "q"),
        ),
        mlp=FUSED_MLP,
        gguf=("phi3", "llama", "deci"),
    ),
    GEMMA2,
    variant(GEMMA2, "gemma3_text", qk_norms=QK_NORMS, gguf=("gemma3",)),
    variant(SCALED, "granite", gguf=("granite", "deci")),
    variant(
        LAYER_NORM,
        "gpt_neox",
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
        rope_names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        gguf=("gptneox",),
    ),
    variant(
        LAYER_NORM,
        "opt",
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
        config_names={**UNGROUPED, "neurons": "ffn_dim"},
        requires={"do_layer_norm_before": True},
        activation="activation_function",
    ),
    variant(PLAIN, "smollm3", gguf=("smollm3",)),
    variant(PLAIN, "seed_oss"),
    variant(PLAIN, "ernie4_5", rope_pairs="neighbours"),
    variant(PLAIN, "ministral"),
    variant(PLAIN, "ministral3", gguf=()),
    variant(
        PLAIN,
        "hunyuan_v1_dense",
        qk_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"),
        gguf=("hunyuan-dense",),
    ),
    variant(LLAMA, "arcee", mlp=PLAIN_MLP, gguf=("arcee",)),
    variant(
        PLAIN,
        "apertus",
        mlp=PLAIN_MLP,
        attention_norms=("attention_layernorm",),
        mlp_norms=("feedforward_layernorm",),
        qk_norms=QK_NORMS,
        buffers=("mlp.act_fn.beta", "mlp.act_fn.eps"),
        gguf=(),
    ),
    variant(PLAIN, "gemma", norm="rms_1p", scaled_embedding=True, gguf=("gemma",)),
    variant(
        GEMMA2,
        "vaultgemma",
        attention_norms=("input_layernorm",),
        mlp_norms=("pre_feedforward_layernorm",),
        post_norms=None,
        gguf=(),
    ),
    GLM,
    variant(
        GLM,
        "glm4",
        attention_norms=("input_layernorm", "post_self_attn_layernorm"),
        mlp_norms=("post_attention_layernorm", "post_mlp_layernorm"),
        post_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
        gguf=("glm4",),
    ),
    variant(POST_NORM, "exaone4", gguf=("exaone4",)),
    variant(OLMO2, "olmo2", gguf=("olmo2",)),
    variant(OLMO2, "olmo3"),
    variant(PLAIN, "helium", heads_fill_width=True, rope_pairs="neighbours"),
    variant(LAYER_NORM, "starcoder2", mlp=mlp("mlp.c_fc", "mlp.c_proj"), gguf=("starcoder2",)),
    variant(LAYER_NORM, "nemotron", mlp=PLAIN_MLP, norm="layer_1p", gguf=("nemotron",)),
    variant(LAYER_NORM, "olmo", attention_clip="clip_qkv", gguf=("olmo",)),
    variant(
        LAYER_NORM,
        "stablelm",
        counts_heads=True,
        head_dim_from_hidden=True,
        heads_divide_hidden=True,
        requires={"qk_layernorm": False, "use_parallel_residual": False},
        gguf=("stablelm",),
    ),
    variant(
        SHARED_NORM,
        "phi",
        attention=attention("dense"),
        mlp=mlp("mlp.fc1", "mlp.fc2"),
        final_norm="model.final_layernorm",
        requires={"qk_layernorm": False},
        gguf=("phi2",),
    ),
    variant(COHERE, "cohere", requires={"use_qk_norm": False}, gguf=("command-r",)),
    variant(COHERE, "cohere2", gguf=("cohere2",)),
)
