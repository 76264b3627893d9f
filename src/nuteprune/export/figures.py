"""The record's figures of answers and context, as rows of tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


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
