"""Experts that a checkpoint stores one by one, and why some cannot be stacked."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

from safetensors import safe_open

_ONE = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
"""A tensor of one expert: its layer's stack, its number, its projection."""


def first_misfit(folder: Path) -> str | None:
    """Return the expert's tensor that is missing, or differs in size from the others.

    transformers stacks them when it loads them, and does not say which it could not stack.

    Args:
        folder: a checkpoint; its files are whole.

    Returns:
        The first that is found, in words; None where there is none.
    """
    sizes: dict[tuple[str, str], dict[int, tuple[int, ...]]] = defaultdict(dict)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if found := _ONE.fullmatch(name):
                    stack, expert, projection = found.groups()
                    size = tuple(file.get_slice(name).get_shape())
                    sizes[stack, projection][int(expert)] = size
    experts: dict[str, set[int]] = defaultdict(set)
    for (stack, _), by_expert in sizes.items():
        experts[stack] |= by_expert.keys()
    for (stack, projection), by_expert in sizes.items():
        usual = Counter(by_expert.values()).most_common(1)[0][0]
        for expert in sorted(experts[stack]):
            there = by_expert.get(expert)
            name = f"{stack}.{expert}.{projection}"
            if there is None:
                return f"no {name}"
            if there != usual:
                return f"{name} is {list(there)}, not {list(usual)}"
    return None
