"""Adapts configs and tokenizer files so that transformers 4 reads them too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from nuteprune.model.lookup import family_named


def add_keys_of_4(path: Path, config: PreTrainedConfig) -> None:
    """Add the keys that transformers 4 calls by another name to a config's file.

    Without them it silently takes defaults. For a model of several modalities they go into the
    config of its language model.
    """
    inner = config.get_text_config()
    keys = _rope_keys_of_4(inner) | _expert_keys_of_4(inner)

    def added(content: dict[str, Any]) -> dict[str, Any]:
        within = {"text_config": content["text_config"] | keys} if inner is not config else keys
        return content | within

    _edit(path, added, sort_keys=True)


LONG_ROPE = {"rope_type", "rope_theta", "short_factor", "long_factor", "partial_rotary_factor"}
"""Keys of a long rope that transformers 4 can read in its own form; other ropes have more keys."""
ORIGINAL = "original_max_position_embeddings"
"""The length before it was made longer: some configs state it beside their rope."""


def _rope_keys_of_4(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rope keys of transformers 4."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    # Some types have one set of parameters per kind of attention.
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention")
    names = family_named(config.model_type).rope_names
    keys = {name: full[key] for key, name in names.items() if key in full}
    if sliding:
        keys["rope_local_base_freq"] = sliding["rope_theta"]
    if full["rope_type"] == "default":
        return keys
    beside = {ORIGINAL} if hasattr(config, ORIGINAL) else set()
    if full["rope_type"] == "longrope" and not set(full) - LONG_ROPE - beside:  # just these three
        factors = {key: full[key] for key in ("short_factor", "long_factor")}
        return keys | {"rope_scaling": {"type": "longrope", **factors}}
    return keys | {"rope_scaling": {k: v for k, v in full.items() if k not in names}}


def _expert_keys_of_4(config: PreTrainedConfig) -> dict[str, Any]:
    """Return how many experts there are, by the name that transformers 4 has for it."""
    family = family_named(config.model_type)
    name = family.experts.count_in_4 if family.experts else ""
    return {name: getattr(config, family.config_names["experts"])} if name else {}


def save_tokenizer_for_4(folder: Path) -> None:
    """Rewrite the tokenizer files in a folder so that transformers 4 reads them, and 5 still does.

    Args:
        folder: where a tokenizer was saved; files that are not there are passed over.
    """
    _edit(folder / "tokenizer_config.json", keys_of_4, sort_keys=True)
    _edit(folder / "tokenizer.json", plain_merges)


def keys_of_4(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's config under the names that transformers 4 knows, and 5 as well."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    own_code = config.get("auto_map") or {}
    if isinstance(own_code.get("AutoTokenizer"), str):  # 5.24 writes it so, and cannot read it
        config["auto_map"] = own_code | {"AutoTokenizer": [own_code["AutoTokenizer"], None]}
    return config


def plain_merges(content: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer whose merges are lines of two tokens, not pairs.

    tokenizers before 0.20, which transformers up to 4.44 needs, reads no others. A tokenizer that
    has a token with a space in it stays as it is: only pairs can state its merges.
    """
    model = content.get("model", {})
    merges = model.get("merges", [])
    in_lines = any(isinstance(merge, str) for merge in merges)
    if not merges or in_lines or any(" " in token for merge in merges for token in merge):
        return content
    return content | {"model": model | {"merges": [" ".join(merge) for merge in merges]}}


def _edit(
    path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], sort_keys: bool = False
) -> None:
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if (new := change(content)) == content:
        return
    text = json.dumps(new, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
