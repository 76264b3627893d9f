"""Which family a model type is of, or the reason why none."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from nuteprune.errors import UserError
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import Family
from nuteprune.model.unsupported import is_encoder, language_model_within, parts_without_gates


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
    if is_encoder(config):
        return f": it is an encoder, no decoder-only language model; {supported}"
    if parts := parts_without_gates(config):
        return f": it has {', '.join(parts)}, which no gate here can cut; {supported}"
    longer = [name for name in FAMILIES if name.startswith(f"{model_type}_")]
    near = longer or get_close_matches(model_type, FAMILIES, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    return (
        f"{hint}; {supported}. A decoder of attention and MLP blocks takes one entry of data: "
        "docs/adding-a-family.md"
    )
