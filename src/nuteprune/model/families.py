"""What the supported model types are made of: frozen data, one short entry per family.

A *projection* is a linear module of a decoder layer. Its `rows` (outputs) and `columns` (inputs)
are named by axis, so that counting and slicing need no knowledge of any model type:

    hidden   the residual stream           q        query heads x head_dim
    neurons  the MLP's inner width         kv       KV heads x head_dim
    qkv      per head: query, key, value (head_dim each), interleaved

Nobody but this file knows a model type; nobody but `anatomy.py` follows these paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal

from nuteprune.errors import UserError
from nuteprune.model.unsupported import language_model_within, parts_without_gates

GATE_KINDS = ("heads", "kv_groups", "neurons", "hidden", "attn_block", "mlp_block")


@dataclass(frozen=True)
class Projection:
    """A linear module of a decoder layer, its path relative to the layer."""

    path: str
    rows: tuple[str, ...]
    columns: str

    @property
    def serves_queries_or_values(self) -> bool:
        """Whether its outputs are queries or values, alone or fused with keys."""
        return self.columns == "hidden" and "k_proj" not in self.path


@dataclass(frozen=True)
class Family:
    """Where the parts of one model type are, and what they mean."""

    model_type: str
    causal_lm: str
    attention: tuple[Projection, ...]
    """Projections of the attention block; the last one writes to the residual stream."""
    mlp: tuple[Projection, ...]
    """Projections of the MLP block; the last one writes to the residual stream."""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    norm: Literal["rms", "rms_1p", "layer"] = "rms"
    """`rms`: x/rms * w; `rms_1p`: x/rms * (1 + w); `layer`: LayerNorm."""
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    """Norms over the hidden width that serve the attention block alone."""
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    post_norms: tuple[str, str] | None = None
    """Norms of what the attention and the MLP add to the residual stream, if there are any."""
    attention_module: str = "self_attn"
    mlp_modules: tuple[str, ...] = ("mlp",)
    """Modules that make up the MLP; when it is removed, the last one yields zeros."""
    counts_heads: bool = False
    """The attention's forward pass reads head counts, so it cannot do with fewer for a while."""
    qk_norms: tuple[str, ...] = ()
    """Per-head norms on queries and keys, in this order, that share the block norms' epsilon."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of the config's hidden size."""
    head_dim_from_hidden: bool = False
    """The stock class derives head_dim from hidden size and head count."""
    vllm_head_dim_from_hidden: bool = False
    """vLLM's own class derives it so, whatever the config says."""
    heads_divide_hidden: bool = False
    """The stock config demands that the head count divides the hidden size."""
    config_names: MappingProxyType[str, str] = field(
        default_factory=lambda: MappingProxyType(
            {
                "heads": "num_attention_heads",
                "kv_heads": "num_key_value_heads",
                "neurons": "intermediate_size",
                "hidden": "hidden_size",
                "epsilon": "rms_norm_eps",
            }
        )
    )
    """Our word for a dimension -> the config's attribute."""
    rope_names: MappingProxyType[str, str] = field(
        default_factory=lambda: MappingProxyType(
            {
                "rope_theta": "rope_theta",
                "partial_rotary_factor": "partial_rotary_factor",
            }
        )
    )
    """Key of `rope_parameters` -> top-level key of config.json up to transformers 4."""
    logit_divisor: str | None = None
    """Config attribute by which logits are divided."""
    logit_softcap: str | None = None
    """Config attribute of the tanh bound on logits."""
    attention_softcap: str | None = None
    """Config attribute of the tanh bound on attention logits."""
    multipliers: tuple[str, str] | None = None
    """Config attributes by which embeddings, and what blocks write, are multiplied."""
    activation: str = "hidden_act"
    """Config attribute that names the MLP's activation function."""
    gguf: tuple[str, ...] = ()
    """llama.cpp's architectures that compute the same (`export.gguf_archs`), best first."""
    requires: MappingProxyType[str, object] = field(default_factory=lambda: MappingProxyType({}))
    """Config values that this entry describes; other checkpoints of the type are refused."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections of a decoder layer, attention first."""
        return self.attention + self.mlp

    def refusal(self, kind: str, uniform: bool = False) -> str | None:
        """Return why gates of `kind` cannot be used on this family, or None if they can.

        Args:
            kind: one of `GATE_KINDS`.
            uniform: whether the result must be a model of the stock class.
        """
        if kind == "hidden" and self.norm == "layer":
            return (
                f"{self.model_type} normalises with LayerNorm, whose mean runs over the whole "
                "width, so cutting hidden dimensions would change the model"
            )
        if uniform and kind in ("attn_block", "mlp_block"):
            return "uniform shapes are alike in all layers, and a stock class has no missing blocks"
        if uniform and kind in ("heads", "kv_groups") and self.head_dim_from_hidden:
            return (
                f"the stock {self.model_type} class computes head_dim from width and head count, "
                "so it cannot have fewer heads; use --shapes free"
            )
        return None


_GATED_MLP = (
    Projection("mlp.gate_proj", ("neurons",), "hidden"),
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

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _LLAMA,
        replace(
            _LLAMA,
            model_type="mistral",
            causal_lm="MistralForCausalLM",
            heads_divide_hidden=False,
        ),
        replace(
            _LLAMA,
            model_type="qwen2",
            causal_lm="Qwen2ForCausalLM",
            vllm_head_dim_from_hidden=True,
            heads_divide_hidden=False,
            gguf=("qwen2", "llama", "deci"),
        ),
        replace(
            _LLAMA,
            model_type="qwen3",
            causal_lm="Qwen3ForCausalLM",
            heads_divide_hidden=False,
            qk_norms=_QK_NORMS,
            gguf=("qwen3", "openelm"),
        ),
        replace(
            _LLAMA,
            model_type="phi3",
            causal_lm="Phi3ForCausalLM",
            heads_divide_hidden=False,
            counts_heads=True,
            attention=(
                Projection("self_attn.qkv_proj", ("q", "kv", "kv"), "hidden"),
                Projection("self_attn.o_proj", ("hidden",), "q"),
            ),
            mlp=(
                Projection("mlp.gate_up_proj", ("neurons", "neurons"), "hidden"),
                Projection("mlp.down_proj", ("hidden",), "neurons"),
            ),
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
            _LLAMA,
            model_type="granite",
            causal_lm="GraniteForCausalLM",
            heads_divide_hidden=False,
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
    )
}


def family_named(model_type: str, config: Mapping[str, Any] | None = None) -> Family:
    """Return the family of a config's `model_type`.

    Args:
        model_type: its name, that of a pruned checkpoint too.
        config: all of the config, so that a refusal can say what the model is.

    Raises:
        UserError: if the type is not supported; says why, and which are.
    """
    model_type = model_type.removeprefix("pruned_")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise UserError(
        f"model type {model_type!r} is not supported{_why_not(model_type, config or {})}"
    )


def _why_not(model_type: str, config: Mapping[str, Any]) -> str:
    """Return what follows "not supported" in a refusal: what the model is, or what is like it."""
    supported = f"supported: {', '.join(FAMILIES)}"
    within = language_model_within(config)
    if within in FAMILIES:
        return (
            f": it is a model of several modalities around a language model of type {within}, "
            f"which is supported. Pass a checkpoint of that language model alone"
        )
    if within is not None:
        around = f" around a language model of type {within}" if within else ""
        return f": it is a model of several modalities{around}; {supported}"
    if parts := parts_without_gates(config):
        return f": it has {', '.join(parts)}, which no gate here can cut; {supported}"
    longer = [name for name in FAMILIES if name.startswith(f"{model_type}_")]
    near = longer or get_close_matches(model_type, FAMILIES, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    return (
        f"{hint}; {supported}. A decoder of attention and MLP blocks takes one entry of data: "
        "docs/adding-a-family.md"
    )
