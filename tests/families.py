"""Which families a test is repeated for: four by `make check`, ten by `make test`, else all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

QUICK = ("llama", "phi3", "gemma2", "gpt_neox")
"""Grouped queries; fused projections; norms behind the blocks and of 1 + w; LayerNorm, biases and
parallel blocks."""
MORE = ("llama_mha", "mistral", "qwen2", "qwen3", "gemma3_text", "granite", "opt")
"""Those that `make test` repeats tests for too; `make test-hard` has the others."""
MIXTURES = (
    *("mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "glm4_moe", "granitemoe", "gpt_oss"),
    *("qwen3_next", "qwen3_5_moe_text", "deepseek_v3", "llama4_text"),
)
"""Families with routed experts, which have tests of their own."""
DENSE_KINDS = ("heads", "kv_groups", "neurons", "hidden", "attn_block", "mlp_block")
"""Kinds of gates of families without."""
HYBRIDS = ("qwen3_5_text", "lfm2", "granitemoehybrid", "falcon_h1")
"""Those whose layers are of several kinds, or whose layers have more than attention and an MLP."""


def mark_of(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """Return the marker of a test that is repeated for a family."""
    if name in QUICK:
        return ()
    return (pytest.mark.slow(0.1) if name in MORE else pytest.mark.hard,)


def each(names: Iterable[Any]) -> list[Any]:
    """Return families for `parametrize`, alone or first of a tuple, with their markers."""
    found = []
    for name in names:
        values = name if isinstance(name, tuple) else (name,)
        found.append(pytest.param(*values, marks=mark_of(values[0])))
    return found


def each_plain_family(test: Callable[..., None]) -> Callable[..., None]:
    """Repeat a test for each model type whose layers are attention and MLP, as `model_type`."""
    plain = each(x for x in dense() if x not in HYBRIDS)
    repeated: Callable[..., None] = pytest.mark.parametrize("model_type", plain)(test)
    return repeated


def each_family(test: Callable[..., None]) -> Callable[..., None]:
    """Repeat a test for each type of dense models, as `model_type`."""
    repeated: Callable[..., None] = pytest.mark.parametrize("model_type", each(dense()))(test)
    return repeated


def dense() -> list[str]:
    """Return the families without routed experts."""
    # Not at the top: conftest.py says first what libraries read when they are imported.
    from nuteprune.model.families import FAMILIES

    return [name for name in FAMILIES if name not in MIXTURES]
