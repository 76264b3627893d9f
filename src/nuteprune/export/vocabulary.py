"""A checkpoint with fewer tokens: its embedding, its head, its settings and its tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nuteprune.errors import RunFailed, UserError
from nuteprune.export.checkpoint import edit_json
from nuteprune.export.loading import build, stored_tensors
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.lookup import family_named
from nuteprune.shrink.token_ids import renumber
from nuteprune.shrink.vocabulary import Merges, cut_tokenizer

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of a tokenizer that are kept; others hold the full vocabulary."""
_TEMPLATE = "chat_template.jinja"


def merges_of(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> Merges:
    """Return the merges that make up a tokenizer's tokens.

    Args:
        tokenizer: a tokenizer with a tokenizer.json.
        rows: those of the embedding; added tokens beyond are left out, such as Gemma's for images
            in a model without images.

    Raises:
        UserError: if it is no BPE tokenizer that can spell any bytes.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer is a {type(tokenizer).__name__} without tokenizer.json; a vocabulary "
            "can be made smaller of BPE tokenizers that have one"
        )
    content = json.loads(backend.to_str())
    if rows is not None:
        added = content.get("added_tokens") or ()
        content["added_tokens"] = [x for x in added if x["id"] < rows]
    return Merges(content)


@torch.no_grad()
def cut_model(anatomy: Anatomy, kept: Sequence[int]) -> PreTrainedModel:
    """Return a model of the same class with some of the rows of its embedding and head.

    Args:
        anatomy: the model; it stays as it is.
        kept: ids that stay, growing.
    """
    model, new = anatomy.model, {old: i for i, old in enumerate(kept)}
    rows = torch.tensor(list(kept))
    cut = {id(x) for x in (anatomy.embedding.weight, anatomy.head.weight, anatomy.head.bias)}
    state = {
        name: p.detach()[rows].clone() if id(p) in cut else p.detach()
        for name, p in stored_tensors(model).items()
    }
    values = renumber(model.config.to_dict(), new.get) | {"vocab_size": len(kept)}
    small = build(type(model.config).from_dict(values), state)
    settings = renumber(model.generation_config.to_dict(), new.get)
    small.generation_config = GenerationConfig.from_dict(settings)
    return small


def cut_tokenizer_of(
    tokenizer: PreTrainedTokenizerBase, merges: Merges, kept: Sequence[int], model_type: str
) -> PreTrainedTokenizerBase:
    """Return a tokenizer with some of the tokens, read back from its files.

    Args:
        tokenizer: the full one.
        merges: of `merges_of`.
        kept: ids that stay, growing.
        model_type: of the model.
    """
    new = {old: i for i, old in enumerate(kept)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            if path.is_file() and path.name not in (*_FILES, _TEMPLATE):
                path.unlink()
        content = json.dumps(cut_tokenizer(merges, kept), ensure_ascii=False)
        (folder / _FILES[0]).write_text(content, encoding="utf-8")
        there = {token for token, i in merges.added.items() if i in new}
        lost = tokenizer.get_added_vocab().keys() - there
        for name in _FILES[1:]:
            edit_json(folder / name, lambda settings: _without(settings, lost, new))
        own: Any = type(tokenizer)
        if not own.__module__.startswith("transformers."):  # code that the user trusts, run already
            return own.from_pretrained(folder)  # type: ignore[no-any-return]
        config = PreTrainedConfig.from_dict({"model_type": family_named(model_type).model_type})
        return AutoTokenizer.from_pretrained(folder, config=config)


def _without(settings: dict[str, Any], lost: set[str], new: dict[int, int]) -> dict[str, Any]:
    """Return a tokenizer's settings without removed tokens, which would be added anew.

    Args:
        settings: what one of its files states.
        lost: the tokens.
        new: id -> the one that it has among those that stay.
    """

    def is_lost(x: Any) -> bool:
        token = x.get("content") if isinstance(x, dict) else x
        return isinstance(token, str) and token in lost

    kept: dict[str, Any] = {
        key: [x for x in value if not is_lost(x)] if isinstance(value, list) else value
        for key, value in settings.items()
        if not is_lost(value)
    }
    if named := kept.get("added_tokens_decoder"):
        kept["added_tokens_decoder"] = {new[int(i)]: x for i, x in named.items() if int(i) in new}
    return kept


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of what a tokenizer adds to text, and of its chat template."""
    found = set(tokenizer("").input_ids)
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    if not tokenizer.chat_template:
        return found
    for begun in (False, True):
        try:
            rendered = tokenizer.apply_chat_template(
                turns[: 1 + (not begun)], tokenize=False, add_generation_prompt=begun
            )
        except Exception:  # it refuses turns without words, or goes wrong in another way
            rendered = tokenizer.chat_template  # as it is written
        found |= set(tokenizer(str(rendered), add_special_tokens=False).input_ids)
    return found


def check_spelling(
    full: PreTrainedTokenizerBase, small: PreTrainedTokenizerBase, texts: Iterable[str]
) -> None:
    """Check that a cut tokenizer gives text back as the full one does.

    Args:
        full: the tokenizer before.
        small: the tokenizer after.
        texts: those to compare.

    Raises:
        RunFailed: naming the first text that differs.
    """
    for text in texts:
        before, after = (
            x.decode(x(text, add_special_tokens=False).input_ids) for x in (full, small)
        )
        if before != after:
            raise RunFailed(
                f"the smaller tokenizer makes {after[:60]!r} of {text[:60]!r}, the full one "
                f"{before[:60]!r}: this tokenizer cannot be cut"
            )
