"""Finds which texts are in-domain for a model, by the text that it learned from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from nuteprune.data.fingerprint import Fingerprint

IN_DOMAIN: Final = "in-domain"
OTHER_TEXT: Final = "other text"
NOT_KNOWN: Final = "not known"
CHANCE = 0.01
"""Share of a text's documents that any two texts may have in common, such as short answers."""


def learned_from(record: Mapping[str, Any]) -> list[Fingerprint | None]:
    """Return the texts that each run of a model read, by its record; None: unknown.

    Args:
        record: its nuteprune.json. Earlier prunings and recoveries count too.
    """
    return list(_learned(record))


def _learned(record: Mapping[str, Any]) -> Iterator[Fingerprint | None]:
    for earlier in record.get("history", ()):
        yield from _learned(earlier)
    if "text" in record or record.get("config", {}).get("data"):
        yield _stated(record)
    entry = record.get("recover")
    while entry:
        yield _stated(entry)
        entry = entry.get("earlier")


def _stated(run: Mapping[str, Any]) -> Fingerprint | None:
    return Fingerprint(run["text"]) if "text" in run else None


def kind_of(judged: Fingerprint, learned: Iterable[Fingerprint | None]) -> str:
    """Return whether a text is `IN_DOMAIN` or `OTHER_TEXT` for a model, or `NOT_KNOWN`.

    A text is in-domain if it shares a file or a public name with the training text, or more than
    `CHANCE` of its documents. It is other text only if it shares no document, and if every run's
    record would show at least one of its documents, had the run read it.

    Args:
        judged: fingerprint of the text's source.
        learned: from `learned_from`.
    """
    shares = [None if run is None else run.share_of(judged) for run in learned]
    if any(share is not None and share > CHANCE for share in shares):
        return IN_DOMAIN
    return OTHER_TEXT if all(share == 0 for share in shares) else NOT_KNOWN


def text_entry(
    learned: Any, judged: Any, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what a record says of a run's text, as `text`.

    Args:
        learned: the data set that was trained on; one without a `fingerprint` is not known.
        judged: what perplexity was measured on, from `nuteprune.data.blocks.held_out_blocks`.
        earlier: the record of the model before this run, if there is one.

    Returns:
        `documents`, `files`, `names` (see `Fingerprint`), and `judged`: source -> its kind.
    """
    known = [*learned_from(earlier or {}), learned.fingerprint]
    kinds = {source: kind_of(x, known) for source, x in judged.fingerprints.items()}
    return {**learned.fingerprint.to_dict(), "judged": kinds}


def judged_kind(record: Mapping[str, Any]) -> str:
    """Return the kind of text that a record's perplexities were measured on.

    Args:
        record: its nuteprune.json.
    """
    run = record.get("recover", record)
    kinds = set(run.get("text", {}).get("judged", {}).values())
    if IN_DOMAIN in kinds:
        return IN_DOMAIN
    return OTHER_TEXT if kinds == {OTHER_TEXT} else NOT_KNOWN
