"""What a record holds: the types of its keys, and its figures as rows of tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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


class Row(NamedTuple):
    """A figure of both models, or one of the pruned model alone.

    Args:
        what: what it is, with its unit.
        dense: the dense model's figure; None: one figure for both, or unknown.
        pruned: the pruned model's figure; None: unknown, for lack of such tokens.
        digits: after the point.
    """

    what: str
    dense: float | None
    pruned: float | None
    digits: int

    @property
    def cells(self) -> tuple[str, str, str]:
        """The row as text; empty where there is no figure."""
        figures = (self.dense, self.pruned)
        return self.what, *("" if x is None else f"{x:.{self.digits}f}" for x in figures)  # type: ignore[return-value]


def answer_rows(record: Mapping[str, Any]) -> list[Row]:
    """Return the figures of answers, none if a record has none."""
    if not (found := record.get("answers")):
        return []

    def both(what: str, key: str, digits: int) -> Row:
        return Row(what, found[key]["before"], found[key]["after"], digits)

    return [
        both("looping, %", "looping", 1),
        both("repeated 4-grams, %", "repeated", 1),
        both("length, tokens", "length", 1),
        both("strangeness to the dense model, nats per token", "nats", 2),
        Row("KL divergence, nats per token", None, found["kl"], 3),
        Row("same likeliest token, %", None, found["agreement"], 1),
    ]


def context_rows(record: Mapping[str, Any]) -> list[Row]:
    """Return the figures of context, none if a record has none."""
    return list(_context_rows(record.get("context") or {}))


def _context_rows(spans: Mapping[str, Any]) -> Iterator[Row]:
    for length, found in spans.items():
        of = f", blocks of {length}" if len(spans) > 1 else ""
        needing, others = found["needing"], found["tokens"] - found["needing"]
        gain = found["gain"]
        yield Row(f"nats lost, {needing:,} tokens that need it{of}", None, found["lost"], 2)
        yield Row(f"nats lost, the other {others:,}{of}", None, found["lost_elsewhere"], 2)
        yield Row(f"nats gained by context{of}", gain["before"], gain["after"], 2)
        yield Row(f"gain kept, %{of}", None, found["kept"], 1)


def definitions(record: Mapping[str, Any]) -> list[str]:
    """Return how the figures of answers and of context are made, a sentence each."""
    said = []
    if found := record.get("answers"):
        how = found["protocol"]
        said.append(
            f"Answers: both models' greedy ones, to {how['answers']} prompts ({how['prompts']}), "
            f"of {how['most_tokens']} tokens at most; the dense model's have {how['tokens']:,}."
        )
        said += [f"{name}: {text}." for name, text in how["measures"].items()]
    for length, found in (record.get("context") or {}).items():
        how = found["protocol"]
        said.append(f"Context: the last tokens of {how['blocks']} blocks of {length}.")
        said += [f"{name}: {text}." for name, text in how["measures"].items()]
    return said
