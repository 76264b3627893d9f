"""What many families have in common: entries that others differ from in a few facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from nuteprune.model.family import CONFIG_NAMES, Family, Projection


def variant(base: Family, model_type: str, name: str, **facts: Any) -> Family:
    """Return the entry of a model type that differs from another in some facts.

    Args:
        base: the other's entry.
        model_type: its name in configs.
        name: its name in classes, such as NAMEForCausalLM.
        **facts: what differs.
    """
    return replace(base, model_type=model_type, causal_lm=f"{name}ForCausalLM", **facts)


def names(base: Mapping[str, str] = CONFIG_NAMES, **others: str) -> MappingProxyType[str, str]:
    """Return the names in a config of a base, some of them others, or more."""
    return MappingProxyType({**base, **others})


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
    "Gemma2",
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

GLM = variant(PLAIN, "glm", "Glm", mlp=FUSED_MLP, gguf=("chatglm",), rope_pairs="neighbours")

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
    config_names=MappingProxyType({k: v for k, v in CONFIG_NAMES.items() if k != "epsilon"}),
    gguf=(),
)

SHARED_NORM = replace(
    LAYER_NORM, attention_norms=(), mlp_norms=(), shared_norms=("input_layernorm",)
)
"""Both blocks read one norm, side by side."""

SCALED = replace(
    PLAIN,
    logit_divisor="logits_scaling",
    multipliers=("embedding_multiplier", "residual_multiplier"),
)
"""The config multiplies embeddings and what blocks write, and divides logits."""
