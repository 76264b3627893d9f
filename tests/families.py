"""Which families a test is repeated for: all by `make test`, four by `make check`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

QUICK = ("llama", "phi3", "gemma2", "gpt_neox")
"""Grouped queries; fused projections; norms behind the blocks and of 1 + w; LayerNorm, biases and
parallel blocks."""


def each(names: Iterable[Any]) -> list[Any]:
    """Return families for `parametrize`, alone or first of a tuple; others are marked `slow`."""
    found = []
    for name in names:
        values = name if isinstance(name, tuple) else (name,)
        marks = () if values[0] in QUICK else (pytest.mark.slow,)
        found.append(pytest.param(*values, marks=marks))
    return found


def each_family(test: Callable[..., None]) -> Callable[..., None]:
    """Repeat a test for each model type, as `model_type`."""
    # Not at the top: conftest.py says first what libraries read when they are imported.
    from nuteprune.model.families import FAMILIES

    repeated: Callable[..., None] = pytest.mark.parametrize("model_type", each(FAMILIES))(test)
    return repeated
