"""Checks that a record can be read: the types of its keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Leaf(NamedTuple):
    """A value: the name of its kind, and a check for it."""

    named: str
    fits: Callable[[Any], bool]


Form = Leaf | Mapping[str, Any] | list[Any]
"""A value, an object by key (`?` ends one that may be missing), or a list of one form."""


def _all(value: Any, leaf: Leaf) -> bool:
    return isinstance(value, list) and all(map(leaf.fits, value))


def _each(named: str, form: Form) -> Leaf:
    """Return what an object is whose keys are anything, and whose values are of one form."""

    def fits(value: Any) -> bool:
        return isinstance(value, dict) and not any(_misfit(x, form, "") for x in value.values())

    return Leaf(f"an object of {named}", fits)


def _or_null(leaf: Leaf) -> Leaf:
    return Leaf(f"{leaf.named} or null", lambda x: x is None or leaf.fits(x))


NUMBER = Leaf("a finite number", lambda x: type(x) in (int, float) and math.isfinite(x))
COUNT = Leaf("a count", lambda x: type(x) is int and x >= 0)
SIZE = Leaf("a count above 0", lambda x: type(x) is int and x > 0)
ABOVE_0 = Leaf("a number above 0", lambda x: type(x) in (int, float) and x > 0)
TEXT = Leaf("text", lambda x: isinstance(x, str))
TEXTS = Leaf("text or a list of texts", lambda x: TEXT.fits(x) or _all(x, TEXT))
KINDS = _each("texts", TEXT)
FIGURES = _each("numbers above 0", _or_null(ABOVE_0))
HASHES = Leaf("hexadecimal digits", lambda x: TEXT.fits(x) and not x.strip("0123456789abcdef"))
NUMBERS = Leaf("a list of numbers", lambda x: _all(x, NUMBER))
_BEFORE_AFTER = {"before": SIZE, "after": SIZE}
_LAYER = dict.fromkeys(("heads", "kv_heads", "neurons", "experts?", "expert_neurons?"), COUNT)
_JUDGED = {"before?": FIGURES, "after?": FIGURES, "protocol?": {"measure": TEXT}}
_BOTH = dict.fromkeys(("before", "after"), _or_null(NUMBER))
_ANSWERS = {
    **dict.fromkeys(("looping", "repeated", "length", "nats"), _BOTH),
    **dict.fromkeys(("kl", "agreement"), _or_null(NUMBER)),
    "protocol": {"measures": KINDS, "prompts": TEXT, "answers": SIZE, "most_tokens": SIZE}
    | {"tokens": SIZE},
}
_CONTEXT = {
    **dict.fromkeys(("tokens", "needing"), COUNT),
    **dict.fromkeys(("lost", "lost_elsewhere", "kept"), _or_null(NUMBER)),
    "gain": _BOTH,
    "protocol": {"measures": KINDS, "blocks": COUNT},
}
_SPANS = _each("figures of context", _CONTEXT)
_COPIED = {"measure": TEXT, "tokens": COUNT, "seed": COUNT}
_READ = {"documents": HASHES, "files": HASHES, "names": TEXTS, "judged?": KINDS}
_TUNED: dict[str, Any] = {"steps": COUNT, "data": TEXT, "kind?": TEXT, "perplexity?": _JUDGED}
_TUNED["text?"] = _READ
_TUNED["earlier?"] = _TUNED
_COST = dict.fromkeys(("seconds", "cpu_seconds", "peak_memory_bytes"), NUMBER)
_STAGES = _each("what stages took", _COST)
RECORD: dict[str, Any] = {
    "target": NUMBER,
    "sparsity": NUMBER,
    "total_sparsity": NUMBER,
    "params": {**_BEFORE_AFTER, "blocks_before": SIZE, "blocks_after": SIZE}
    | {"active_before?": SIZE, "active_after?": SIZE},
    "layers": [_LAYER],
    "layers_before": [_LAYER],
    "hidden": _BEFORE_AFTER,
    "shapes?": TEXT,
    **dict.fromkeys(("base_model?", "license?", "license_name?", "license_link?"), _or_null(TEXT)),
    "teachers?": {"count": COUNT, "sparsities?": NUMBERS},
    "perplexity?": _JUDGED,
    "copying?": {"before?": _or_null(NUMBER), "after?": _or_null(NUMBER), "protocol?": _COPIED},
    "text?": _READ,
    "answers?": _ANSWERS,
    "context?": _SPANS,
    "asked?": {"kind": TEXT, "value": NUMBER},
    "config?": {"model?": _or_null(TEXT), "data?": TEXTS, "length?": SIZE, "eval_blocks?": SIZE}
    | dict.fromkeys(("eval_data?", "text_column?"), _or_null(TEXT)),
    "vocab?": _BEFORE_AFTER,
    "recover?": _TUNED,
    "versions?": {"nuteprune?": TEXT},
    "bytes_on_disk?": SIZE,
    "peak_memory_bytes?": NUMBER,
    "seconds?": NUMBER,
    "stages?": _STAGES,
    "seed?": COUNT,
}
"""The keys that readers of a record go by; see docs/json.md. It may have others."""
RECORD["history?"] = [RECORD]


def misfit(record: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a record, None if it can be read."""
    if found := _misfit(record, RECORD, ""):
        return found
    for one in (record, *record.get("history", ())):
        before, after = len(one["layers_before"]), len(one["layers"])
        if before != after:
            return f"layers are {after}, and layers_before {before}"
    return None


def _misfit(value: Any, form: Form, where: str) -> str | None:
    if isinstance(form, Leaf):
        return None if form.fits(value) else f"{where} is not {form.named}"
    if isinstance(form, list):
        if not isinstance(value, list) or not value:
            return f"{where} is not a list, or an empty one"
        parts = [(x, form[0], f"{where}[{i}]") for i, x in enumerate(value)]
    else:
        if not isinstance(value, dict):
            return f"{where} is not an object"
        parts = []
        for key, inner in form.items():
            name, prefix = key.removesuffix("?"), f"{where}." if where else ""
            if name not in value and name == key:
                return f"it lacks {prefix}{name}"
            if name in value:
                parts.append((value[name], inner, prefix + name))
    return next((found for part in parts if (found := _misfit(*part))), None)
