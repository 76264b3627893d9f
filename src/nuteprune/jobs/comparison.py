"""How a recovered model compares: with its record, and with the dense model tuned alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuteprune.export.record import perplexities_of
from nuteprune.files import write_json
from nuteprune.judge.retention import retentions
from nuteprune.run_folder import RECORD


@dataclass(frozen=True)
class Tuned:
    """A model that was tuned and written.

    Args:
        result: what is printed: `out`, `recover`, and the record where there is one.
        work: multiply-adds with weights per token of a forward pass.
    """

    result: dict[str, Any]
    work: int


def compared(dense: str, ours: Tuned, theirs: Tuned) -> dict[str, Any]:
    """Compare the tuned pruned model with the dense model, tuned in the same way.

    Args:
        dense: the dense model's name, as the user gave it.
        ours: the pruned model, tuned.
        theirs: the dense one.

    Returns:
        `model`, `out`, `perplexity` {`before`, `after`}, `retention` {`before`, `after`: {text:
        percent, `mean`}}, `seconds_per_step`, `time_ratio` (ours over theirs; None where a resumed
        run took no step) and `work_ratio`, the same of multiply-adds with weights.
    """
    mine, entry = ours.result["recover"], theirs.result["recover"]
    found = entry["perplexity"]
    times = mine["seconds_per_step"], entry["seconds_per_step"]
    return {
        "model": dense,
        "out": theirs.result["out"],
        "perplexity": {when: found[when] for when in ("before", "after")},
        "retention": {
            when: retentions(mine["perplexity"][when], found[when]) for when in ("before", "after")
        },
        "seconds_per_step": times[1],
        "time_ratio": times[0] / times[1] if all(times) else None,
        "work_ratio": ours.work / theirs.work,
    }


def note(result: dict[str, Any], comparison: Mapping[str, Any]) -> None:
    """Add a comparison to a result, and to the record that was written of it, if there is one."""
    result["recover"]["against"] = dict(comparison)
    path = Path(result["out"]) / RECORD
    if path.is_file():
        write_json(path, {k: x for k, x in result.items() if k != "out"})


def judged_again(record: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record's perplexities: the dense model's stay where the blocks are the same."""
    found, protocol = entry["perplexity"], record.get("perplexity", {}).get("protocol")
    before, after = perplexities_of(record)
    same = protocol == found["protocol"] and set(after) == set(found["after"])
    return {**found, "before": before if same else {}}
