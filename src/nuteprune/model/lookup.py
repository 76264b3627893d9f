"""Which family a model type is of, or the reason why none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from nuteprune.errors import UserError
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import PREFIX, Family
from nuteprune.model.unsupported import is_encoder, language_model_within, parts_without_gates

_OWN: dict[str, Family] = {}
"""Entries that users brought along, for as long as this process runs."""


def family_named(model_type: str, config: Mapping[str, Any] | None = None) -> Family:
    """Return the family of a config's `model_type`.

    Args:
        model_type: its name, that of a pruned checkpoint too.
        config: all of the config, so that a refusal can say what the model is.

    Raises:
        UserError: if the type is not supported; says why, and what to do.
    """
    model_type = model_type.removeprefix(PREFIX)
    if found := _OWN.get(model_type) or FAMILIES.get(model_type):
        return found
    raise UserError(
        f"model type {model_type!r} is not supported{_why_not(model_type, config or {})}"
    )


def bring_along(family: Family) -> None:
    """Register a user's entry for a family in this process."""
    _OWN[family.model_type] = family


def brought_along(model_type: str) -> Family | None:
    """Return the entry that a user brought along for a model type, None if none did."""
    return _OWN.get(model_type.removeprefix(PREFIX))


def all_brought_along() -> tuple[Family, ...]:
    """Return the entries that users brought along."""
    return tuple(_OWN.values())


@contextmanager
def knowing(family: Family) -> Iterator[None]:
    """Register an entry for a family within the context."""
    before = _OWN.get(family.model_type)
    bring_along(family)
    try:
        yield
    finally:
        del _OWN[family.model_type]
        if before is not None:
            bring_along(before)


def why_never(config: Mapping[str, Any]) -> str | None:
    """Return why no family entry can describe a config, None if one might."""
    within = language_model_within(config)
    if within in FAMILIES:
        return (
            f"it is a model of several modalities around a language model of type {within}, "
            f"which is supported. Pass a checkpoint of that language model alone"
        )
    if within is not None:
        around = f" around a language model of type {within}" if within else ""
        return f"it is a model of several modalities{around}"
    if is_encoder(config):
        return "it is an encoder, no decoder-only language model"
    if parts := parts_without_gates(config):
        return f"it has {', '.join(parts)}, which no gate here can cut"
    return None


def _why_not(model_type: str, config: Mapping[str, Any]) -> str:
    """Return what follows "not supported" in a refusal: what the model is, or what is like it."""
    supported = f"supported: {', '.join(FAMILIES)}"
    if never := why_never(config):
        return f": {never}" if "Pass a checkpoint" in never else f": {never}; {supported}"
    longer = [name for name in FAMILIES if name.startswith(f"{model_type}_")]
    near = longer or get_close_matches(model_type, FAMILIES, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    return (
        f"{hint}; {supported}. `nuteprune family MODEL` proposes an entry for it, which prune "
        "--family takes"
    )
