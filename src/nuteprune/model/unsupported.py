"""What a model is made of that no family describes: read from its config, for refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Counts of feed-forward networks that a router chooses from."""
LATENT = ("kv_lora_rank", "o_lora_rank")
"""Ranks of the projections by which queries, keys and values share a latent vector."""
RECURRENT = (
    "conv_L_cache",
    "linear_conv_kernel_dim",
    "lru_width",
    "mamba_d_state",
    "ssm_state_size",
    "state_size",
)
"""Sizes of layers that carry a state from token to token in place of attention."""
RECURRENT_LAYERS = {"conv", "hybrid", "linear_attention", "mamba", "recurrent"}
"""Words for them in lists of layer types."""
ENCODERS = ("type_vocab_size", "sinusoidal_pos_embds")
"""Settings that encoders such as BERT have, and no decoder."""
OTHER_MODALITIES = ("vision_config", "audio_config", "text_config")
"""Parts of a model for several modalities."""


def parts_without_gates(config: Mapping[str, Any]) -> list[str]:
    """Return the parts in a config that no gate can cut; empty for a plain decoder.

    Args:
        config: `config.json`, or a config's `to_dict()`.
    """
    return list(_parts(config))


def language_model_within(config: Mapping[str, Any]) -> str | None:
    """Return the model type of the language model that a multimodal model wraps, None for others.

    It is empty where the config does not name it.
    """
    if not any(isinstance(config.get(name), Mapping) for name in OTHER_MODALITIES):
        return None
    text = config.get("text_config")
    return str(text.get("model_type", "")) if isinstance(text, Mapping) else ""


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Return whether a config is of an encoder such as BERT, which reads text and writes none."""
    named = [str(name) for name in config.get("architectures") or ()]
    masked = any(name.endswith("ForMaskedLM") for name in named)
    alone = not (config.get("is_decoder") or config.get("is_encoder_decoder"))
    return alone and (masked or any(name in config for name in ENCODERS))


def _parts(config: Mapping[str, Any]) -> Iterator[str]:
    inner = config.get("ffn_config")
    counts = [of.get(name) for of in (config, inner or {}) for name in EXPERTS]
    if any(isinstance(count, int) and count > 1 for count in counts):
        yield "a mixture of experts (MoE)"
    if any(config.get(name) for name in LATENT):
        yield "multi-head latent attention (MLA)"
    listed = [config.get(x) for x in ("layer_types", "layers_block_type", "block_types")]
    kinds = {str(kind) for kinds in listed if isinstance(kinds, list) for kind in kinds}
    if kinds & RECURRENT_LAYERS or any(config.get(name) for name in RECURRENT):
        yield "state-space, recurrent or convolutional layers"
    if config.get("hidden_size_per_layer_input"):
        yield "embeddings that each layer reads besides the residual stream"
    if config.get("num_kv_shared_layers"):
        yield "layers that attend to keys and values of earlier ones"
    if any(config.get("activation_sparsity_pattern") or ()):
        yield "neurons that are switched off by how all of them compare"
    if config.get("is_encoder_decoder"):
        yield "an encoder"
