"""Tokenizer files that older programs read as well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def save_for_older(folder: Path) -> None:
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

    Before 0.20, tokenizers, which transformers up to 4.44 asks for, reads no others. A token that
    has a space in it can stand in pairs alone; such a tokenizer stays as it is.
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
