"""Targets as users write them: a share, parameters, bytes or speed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Any

from nuteprune.errors import UserError

COUNT_UNITS = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3, "": 1}
"""Unit of a count of parameters -> its size, the largest first."""
BYTE_UNITS = {
    **{"TiB": 2**40, "TB": 10**12, "GiB": 2**30, "GB": 10**9},
    **{"MiB": 2**20, "MB": 10**6, "KiB": 2**10, "kB": 10**3, "B": 1, "": 1},
}
"""Unit of a size -> its bytes, the largest first."""


DECODE, MOMENT = "decode", "1x256+32"
"""Defaults: what is to be faster, and at which sequences x prompt + new tokens."""
FASTER = (DECODE, "prefill", "both")
"""What can be made faster; both: prompt and new tokens together."""


def _cache(where: str) -> dict[str, Any]:
    """Return the KV cache that memory is asked for with, written as `8192` or `2x8192`."""
    match = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,9})", where)
    sequences, context = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if not sequences * context:
        raise UserError(
            f"memory is of weights and KV cache, and @{where[:60]} says for no number of tokens: "
            "write 4GiB@8192, or 4GiB@2x8192 for two sequences"
            if where
            else "memory is of weights and KV cache: say for how many tokens, such as 4GiB@8192"
        )
    return {"context": context, "sequences": sequences}


def _pace(where: str) -> dict[str, Any]:
    """Return what is to be faster, and when, written as `prefill`, `1x512+64` or both with `:`."""
    first, _, rest = where.partition(":")
    faster, at = (first, rest) if first in FASTER else (DECODE, where)
    moment(at or MOMENT)
    return {"for": faster, "at": at or MOMENT}


@dataclass(frozen=True)
class Kind:
    """A kind of target, such as `params`: its setting is `target_params`, its option `--params`.

    Args:
        units: those that may follow a number.
        such: an example of a value.
        above: the value is more than this.
        whole: whether it is a whole number.
        at: parses what follows an `@`; None: nothing may follow.
    """

    units: Mapping[str, int]
    such: str
    above: int = 0
    whole: bool = True
    at: Callable[[str], dict[str, Any]] | None = None


KINDS = {
    "params": Kind(COUNT_UNITS, "100M"),
    "active_params": Kind(COUNT_UNITS, "3B"),
    "size": Kind(BYTE_UNITS, "200MB"),
    "memory": Kind(BYTE_UNITS, "4GiB", at=_cache),
    "speedup": Kind({"x": 1, "": 1}, "1.5", above=1, whole=False, at=_pace),
}
"""Kind of target, as the record has it -> how it is written."""
SETTINGS = {"target_sparsity": "--sparsity", "shape": "--shape"} | {
    f"target_{kind}": f"--{kind.replace('_', '-')}" for kind in KINDS
}
"""Settings that say how much is to go -> their option; a run has one of them."""


@dataclass(frozen=True)
class Asked:
    """One target, as it was asked for.

    Args:
        kind: `sparsity`, `shape` or one of `KINDS`.
        value: a share (`sparsity`, `shape`), parameters, bytes, or times as fast.
        about: the conditions of the value, such as `context`.
    """

    kind: str
    value: float
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The value in its one canonical spelling."""
        return spelled(self.kind, self.value)

    @property
    def at(self) -> str:
        """What it depends on, as users write it after the value: `@8192`; nothing by default."""
        if self.kind == "memory":
            context, sequences = self.about["context"], self.about["sequences"]
            return f"@{context}" if sequences == 1 else f"@{sequences}x{context}"
        usual = {"for": DECODE, "at": MOMENT}
        told = [x for key, x in self.about.items() if x != usual.get(key)]
        return f"@{':'.join(told)}" if told else ""

    @property
    def folder(self) -> str:
        """The name of its checkpoint's folder, where a run has several: see `run_folder`."""
        return f"{self.kind}-{self.text}"

    def __str__(self) -> str:
        return f"{self.kind} {self.text}"


def spelled(kind: str, value: float) -> str:
    """Return a target's value as users write it: `0.2`, `100M`, `200MB`, `4GiB`."""
    if kind not in KINDS or not KINDS[kind].whole:
        return f"{value:g}"
    for unit, size in KINDS[kind].units.items():
        share = Decimal(round(value)) / size
        if share >= 1 and share == round(share, 3):
            return f"{share.normalize():f}{unit}"
    return str(round(value))


def sparsities(given: Any) -> tuple[float, ...]:
    """Return the sparsities that are given.

    Args:
        given: a share, text such as `0.2,0.5`, or a list of shares.

    Raises:
        UserError: for what is neither.
    """
    try:
        return tuple(float(x) for x in _each(given))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"sparsity is {given!r}, neither a share nor several: write 0.2, or 0.2,0.5"
        ) from error


def all_asked(kind: str, given: Any) -> tuple[Asked, ...]:
    """Return the targets of a kind that are given, the largest model first.

    Args:
        kind: one of `KINDS`.
        given: a number, text such as `100M` or `120M,100M`, or a list of these; the last may end
            with `@` and its condition.

    Raises:
        UserError: if a value is wrong or lacks the `@` that it needs, or models do not become
            smaller.
    """
    read, about, parts = KINDS[kind].at, {}, list(_each(given))
    if read is not None:
        parts[-1], _, where = str(parts[-1]).partition("@")
        about = read(where)
    found = tuple(Asked(kind, value_of(kind, x), about) for x in parts)
    sizes = [x.value if KINDS[kind].whole else -x.value for x in found]  # the faster, the smaller
    if any(a <= b for a, b in pairwise(sizes)):
        told = ", ".join(x.text for x in found)
        raise UserError(f"{kind} is {told}; of several the largest model comes first")
    return found


def _each(given: Any) -> Any:
    """Return the values of a list or of a text with commas, or the one value."""
    if isinstance(given, str):
        return given.split(",")
    return given if isinstance(given, list | tuple) and given else [given]


def value_of(kind: str, given: Any, name: str = "") -> float:
    """Return one value that is given for a kind of target, or for a value of the same form.

    Args:
        kind: one of `KINDS`.
        given: a number, or text such as `100M`.
        name: its name in errors, if not that of its kind.

    Raises:
        UserError: for what is no such value.
    """
    how = KINDS[kind]
    if isinstance(given, int | float) and not isinstance(given, bool):
        given = format(Decimal(str(given)), "f") if math.isfinite(given) else str(given)
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE]\+?\d{1,3})?)\s*([A-Za-z]*)\s*", str(given))
    sizes = {unit.lower(): size for unit, size in how.units.items()}
    if match is not None and match[2].lower() in sizes and len(match[1]) <= 30:
        exact = Decimal(match[1]) * sizes[match[2].lower()]
        value = int(exact) if how.whole else float(exact)
        if how.above < value < 10**18:
            return value
    raise UserError(
        f"{name or kind} is {str(given)[:60]!r}; write a number above {how.above} with "
        f"{', '.join(filter(None, how.units))} or no unit, such as {how.such}"
    )


def check_one(given: Mapping[str, Any], settings: Iterable[str]) -> None:
    """Refuse more than one kind of target.

    Args:
        given: setting -> value, None where not given.
        settings: those of `SETTINGS` that exclude each other.

    Raises:
        UserError: naming the first two.
    """
    named = [SETTINGS[x] for x in settings if given.get(x) is not None]
    if len(named) > 1:
        raise UserError(f"{named[0]} and {named[1]} both say how much is to go; pass one of them")


def moment(text: str) -> tuple[int, int, int]:
    """Return the work to time: sequences, tokens of a prompt, tokens after it.

    Args:
        text: such as `1x256+32`.

    Raises:
        UserError: if it is written otherwise.
    """
    match = re.fullmatch(r"(\d{1,6})x(\d{1,7})\+(\d{1,7})", text)
    if match is None or not all(numbers := tuple(map(int, match.groups()))):
        raise UserError(
            f"speedup is asked for at {text[:60]!r}; write {', '.join(FASTER)}, or sequences x "
            f"prompt + new tokens, or both: 1.5@prefill, 1.5@{MOMENT}, 1.5@prefill:{MOMENT}"
        )
    return numbers[0], numbers[1], numbers[2]
