"""Numbers, and dtypes, as people read them."""

from __future__ import annotations

import torch

from nuteprune.console import scaled

THIN = "\u202f"
"""Stands between a number and its unit."""


def number(value: float) -> str:
    """Return a number for people: grouped in thousands, fewer digits where it is large."""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}"


def count(value: float) -> str:
    """Return a count of parameters for people."""
    return THIN.join(filter(None, scaled(value, "B")))


def size(value: float) -> str:
    """Return a number of bytes for people."""
    return f"{THIN.join(scaled(value, 'G'))}B"


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 120:
        return f"{seconds:.0f}{THIN}s"
    minutes = round(seconds / 60)
    return f"{minutes}{THIN}min" if minutes < 120 else f"{seconds / 3600:.1f}{THIN}h"


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as options name it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
