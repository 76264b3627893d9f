"""Small models from a config: the same code with few layers and small sizes, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nuteprune.errors import UserError, in_one_line
from nuteprune.model.anatomy import silence_dropout

NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "embed_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "neurons": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_dim_base"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "epsilon": (
        *("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        *("layernorm_epsilon", "rms_norm_epsilon"),
    ),
}
"""Our word for a dimension -> what configs call it."""
SIZES = {"hidden": 96, "heads": 4, "kv_heads": 2, "neurons": 112, "head_dim": 16}
"""Sizes of a small model: no two axes of a layer are alike, if the class has them apart."""
LAYERS, VOCABULARY, POSITIONS, WINDOW, ROTATED = 3, 128, 64, 6, 8
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
LARGEST = 10_000_000
"""Parameters up to which a model counts as small."""
_LEFT_OUT = {
    *("architectures", "auto_map", "dtype", "quantization_config", "transformers_version"),
    *("_name_or_path", "torch_dtype", "per_layer_config", "decoder_start_token_id"),
}


_SCALING = {
    *("factor", "attention_factor", "short_factor", "long_factor", "beta_fast", "beta_slow"),
    *("low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "type", "truncate"),
    "max_position_embeddings",
}
"""Rotary parameters for longer texts, which the default kind has not."""


def names_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return our words for dimensions -> the attributes of a config that states them."""
    found = {}
    for word, names in NAMES.items():
        if here := [name for name in names if name in values]:
            found[word] = here[0]
    return found


def small_config(config: PreTrainedConfig, **sizes: int | None) -> PreTrainedConfig:
    """Return a config of the same type with few layers and small sizes.

    Args:
        config: any config.
        **sizes: replacements for sizes of `SIZES`; None: not stated.

    Raises:
        UserError: if the config class does not take these sizes.
    """
    old = config.to_dict()
    names = names_of(old)
    wanted: dict[str, int | None] = {**SIZES, **sizes}
    values = {k: _shrunk(k, v) for k, v in old.items() if k not in _LEFT_OUT}
    twins = {old.get(names.get("hidden", "")): wanted["hidden"]}
    for key, value in old.items():  # as OPT's word_embed_proj_dim, which is the width
        if type(value) is int and value > SIZES["hidden"] and value in twins:
            values[key] = twins[value]
    for word, name in names.items():
        if word in wanted:
            values[name] = wanted[word]
    values["head_dim"] = wanted["head_dim"]
    if wanted["head_dim"] is None:
        del values["head_dim"]
    if "layers" in names:
        values[names["layers"]] = LAYERS
        whole = old[names["layers"]]
        lists = {k: v for k, v in old.items() if isinstance(v, list) and len(v) == whole}
        values |= {key: _some_of_each(items) for key, items in lists.items()}
    try:
        return type(config).from_dict(values)
    except Exception as error:  # whatever validators raise
        raise UserError(f"{type(config).__name__} takes no small sizes: {_line(error)}") from error


def _some_of_each(items: list[Any]) -> list[Any]:
    """Return as many items as a small model has layers, of every kind that there is."""
    kinds = list(dict.fromkeys(map(str, items)))
    firsts = [next(x for x in items if str(x) == kind) for kind in kinds]
    return [*firsts, *items][:LAYERS]


def _shrunk(key: str, value: Any) -> Any:
    """Return a config's value as a small model wants it, where its size follows from nothing."""
    if isinstance(value, dict) and key == "rope_parameters":
        return _plain_rope(value)
    if isinstance(value, float) and "drop" in key:
        return 0.0
    if key == "rotary_dim":
        return ROTATED
    if key in TOKENS:
        return TOKENS[key]
    if type(value) is not int:
        return value
    if key.endswith("_token_id"):
        return 0
    if key == "vocab_size" or key.startswith("vocab_size_"):
        return VOCABULARY
    if "position" in key and value > POSITIONS:
        return POSITIONS
    return WINDOW if "window" in key and value > WINDOW else value


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters without values per feature or for longer texts."""
    if any(isinstance(x, dict) for x in rope.values()):  # one set for each kind of attention
        return {k: _plain_rope(x) if isinstance(x, dict) else x for k, x in rope.items()}
    kept = {k: v for k, v in rope.items() if k not in _SCALING}
    return {**kept, "rope_type": "default"}


def small_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a causal LM of a small config, all parameters random: norms and biases too.

    Raises:
        UserError: if transformers has no causal LM of that type, or it cannot be built.
    """
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            raise UserError(
                f"a small {config.model_type} would still have {size:,} parameters: its config "
                "states sizes by names that are not known here"
            )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    except UserError:
        raise
    except Exception as error:  # whatever its constructor raises
        raise UserError(
            f"no small {config.model_type} model can be built: {_line(error)}"
        ) from error
    silence_dropout(model)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            around_one = parameter.dim() == 1 and bool((parameter == 1).all())
            noise = 0.2 * torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise + around_one)
    return model  # type: ignore[no-any-return]


def config_named(model_type: str) -> PreTrainedConfig:
    """Return the default config of a model type.

    Raises:
        UserError: if transformers does not know it.
    """
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"transformers knows no model type {model_type!r}")
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception as error:  # whatever validators raise
        raise UserError(f"{model_type} has no default config: {_line(error)}") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {in_one_line(error)}"
