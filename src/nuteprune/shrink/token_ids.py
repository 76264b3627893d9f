"""Finds and renumbers token ids in a model's settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

_NAMED = re.compile(
    r"(^|_)token_(id|ids|index|indices)$|suppress_tokens$|^(bad|force)_words_ids$"
    r"|^sequence_bias$|^forced_decoder_ids$|^(lang|task|lang_code)_to_id$"
)
"""Settings of transformers that hold token ids, in whatever form."""
_Change = Callable[[int], int | None]


def renumber(values: Mapping[str, Any], change: _Change) -> dict[str, Any]:
    """Return settings of a model with their token ids renumbered.

    Args:
        values: a config, or settings of generation.
        change: old id -> new id; None where it is gone.
    """
    found = {}
    for key, value in values.items():
        if _names_tokens(key):
            value = _changed(key, value, change)
        elif isinstance(value, Mapping):
            value = renumber(value, change)
        found[key] = value
    return found


def _names_tokens(key: object) -> bool:
    """Return whether a setting holds token ids."""
    return isinstance(key, str) and _NAMED.search(key) is not None


def tokens_in(values: Mapping[str, Any]) -> set[int]:
    """Return the token ids that settings name."""
    found: set[int] = set()
    renumber(values, found.add)
    return found


def unknown_ids(values: Mapping[str, Any], known: Collection[str], rows: int) -> list[str]:
    """Return the settings that nobody declares and that could hold token ids.

    Args:
        values: a config, or settings of generation.
        known: names that transformers declares.
        rows: of the embedding.
    """
    return [
        key
        for key, value in values.items()
        if not (key in known or key.startswith("_") or _names_tokens(key))
        and any(_is_id(x) and x < rows for x in _leaves(value))
    ]


def _changed(key: str, value: Any, change: _Change) -> Any:
    """Return a setting with its ids renumbered; an id that is gone becomes None."""
    if key == "sequence_bias" and value is not None:  # sequences, each with what is added to it
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        there = [(ids, bias) for x, bias in pairs if (ids := _sequence(x, change)) is not None]
        if isinstance(value, Mapping):
            return {tuple(ids): bias for ids, bias in there} or None
        return [[ids, bias] for ids, bias in there] or None
    if key == "forced_decoder_ids" and value is not None:  # a place, and the token there
        there = [(at, None if i is None else change(i)) for at, i in value]
        return [[at, i] for at, i in there if i is not None] or None
    if isinstance(value, Mapping):  # of names
        return {name: i for name, x in value.items() if (i := change(x)) is not None}
    if isinstance(value, list):
        if value and isinstance(value[0], list):
            return _sequences(value, change)
        return [i for x in value if (i := change(x)) is not None]
    return change(value) if _is_id(value) else value


def _sequences(value: list[Any], change: _Change) -> list[Any] | None:
    """Return the sequences (or alternatives of them) whose tokens all stay."""
    nested = (
        _sequences(x, change) if x and isinstance(x[0], list) else _sequence(x, change)
        for x in value
    )
    return [x for x in nested if x is not None] or None


def _sequence(ids: Any, change: _Change) -> list[int] | None:
    changed = [change(i) for i in ids]
    return None if None in changed else [i for i in changed if i is not None]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
