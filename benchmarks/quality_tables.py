"""What the quality table prints: in-domain text, other text and copying side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quality_text import Setting

from nuteprune.console import Output, millions

Record = Mapping[str, Any]
Group = tuple[str, float, int]
"""Label, target and steps: what a row is of; seeds are summed up."""


def print_dense(dense: Record, setting: Setting, output: Output) -> None:
    """Print what is pruned and judged by."""
    machine = dense["machine"]
    each = ", ".join(f"{name} {x:.2f}" for name, x in dense["perplexity"].items())
    output.line(
        f"{setting.model}: {millions(dense['params'])} parameters; held-out perplexity "
        f"{dense['mean']:.2f} ({each}), up to {setting.eval_blocks} x {setting.length} tokens each"
    )
    other = ", ".join(f"{name} {x:.2f}" for name, x in dense.get("other", {}).items())
    copied = percent([dense.get("copying")])
    purpose = "to choose by" if setting.choose else "to accept by"
    output.line(f"other text: {other or '-'}; copying: {copied} %; {purpose}")
    output.line(
        f"{machine['accelerator'] or machine['processor']}, {machine['threads']} threads, "
        f"{setting.dtype}; nuteprune {machine['nuteprune']}, torch {machine['torch']}"
    )


def spread(values: Sequence[float]) -> str:
    """Return mean and, of several values, their standard deviation."""
    if not values:
        return "-"
    middle = statistics.fmean(values)
    digits = 2 if middle < 100 else 1 if middle < 1000 else 0
    text = f"{middle:.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def known(values: Sequence[float | None]) -> list[float]:
    """Return the values that are there: old records have no other text and no copying."""
    return [x for x in values if x is not None]


def percent(values: Sequence[float | None]) -> str:
    """Return the mean of percentages, and of several their standard deviation."""
    if not (there := known(values)):
        return "-"
    text = f"{statistics.fmean(there):.1f}"
    return text if len(there) < 2 else f"{text} ± {statistics.stdev(there):.1f}"


def ratio(values: Sequence[float | None]) -> str:
    """Return the mean of ratios to the dense model, and of several their standard deviation."""
    if not (there := known(values)):
        return "-"
    text = f"{statistics.fmean(there):.3f}"
    return text if len(there) < 2 else f"{text} ± {statistics.stdev(there):.3f}"


def grouped(records: Sequence[Record]) -> dict[Group, list[Record]]:
    """Return the records of each row, by target and steps; refused ones are left out."""
    groups: dict[Group, list[Record]] = {}
    for record in records:
        if "mean" in record:
            key = (record["label"], record["target"], record["steps"])
            groups.setdefault(key, []).append(record)
    return dict(sorted(groups.items(), key=lambda x: x[0][1:]))


COLUMNS = ("mean", "in-domain × dense", "other text × dense", "copying %", "seeds", "seconds")


def figures(cells: Sequence[Record]) -> list[str]:
    """Return what `COLUMNS` say of a row's records, which have `times_dense`."""
    times = [cell["times_dense"] for cell in cells]
    return [
        spread([cell["mean"] for cell in cells]),
        ratio([x["in_domain"] for x in times]),
        ratio([x["other_mean"] for x in times]),
        percent([cell.get("copying") for cell in cells]),
        str(len(cells)),
        f"{statistics.fmean(cell['seconds'] for cell in cells):.0f}",
    ]


def rows_of(records: Sequence[Record]) -> list[list[str]]:
    """Return a row per label, target and number of steps."""
    found = []
    for (label, target, steps), cells in grouped(records).items():
        found.append([label, f"{target:.0%}", str(steps), *figures(cells)])
    return found


def refitted(record: Record) -> Record:
    """Return an untrained record's refitted stage."""
    return {**record, **record["refitted"]} if "refitted" in record else record


STAGES: dict[str, Callable[[Record], Record]] = {
    "Nothing trained": lambda record: record,
    "Nothing trained, projections refitted": refitted,
}
"""The tables that untrained records make, and what each is of."""
TRAINED = {"trained": "Trained", "ablation": "One factor at a time"}
"""Part -> the table that its records make."""


def sections(part: str, records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Return the tables of a part of the plan: titles and records."""
    if part in TRAINED:
        return [(TRAINED[part], list(records))]
    return [(title, [stage(record) for record in records]) for title, stage in STAGES.items()]


def print_part(part: str, records: Sequence[Record], output: Output) -> None:
    """Print what is left by a part of the plan, and what could not be run."""
    for title, found in sections(part, records):
        print_rows(title, found, output)
    print_refused(records, output)


def print_rows(title: str, records: Sequence[Record], output: Output) -> None:
    """Print figures side by side, then each source's perplexity and each domain × dense."""
    groups = grouped(records)
    if not groups:
        return
    output.table(title, ["run", "target", "steps", *COLUMNS], rows_of(records))
    cells = [cell for found in groups.values() for cell in found]
    sources = list(dict.fromkeys(name for cell in cells for name in cell["perplexity"]))
    domains = list(dict.fromkeys(x for cell in cells for x in cell["times_dense"]["other"]))
    rows = []
    for (label, target, steps), found in groups.items():
        each = [spread([cell["perplexity"][name] for cell in found]) for name in sources]
        other = [[cell["times_dense"]["other"].get(x) for cell in found] for x in domains]
        rows.append([label, f"{target:.0%}", str(steps), *each, *map(ratio, other)])
    columns = ["run", "target", "steps", *sources, *(f"{x} × dense" for x in domains)]
    output.table(f"{title}: perplexity of each text", columns, rows)


def print_refused(records: Sequence[Record], output: Output) -> None:
    """Say which cells could not be run, and why."""
    for record in records:
        if "refused" in record:
            output.line(f"{record['label']} at {record['target']:.0%}: {record['refused']}")


def markdown(table: Mapping[str, Any], parts: Sequence[str]) -> str:
    """Return the rows that a table has as a page shows them, a table for each title.

    Args:
        table: what `table.json` holds.
        parts: which parts of the plan, as far as it has them.
    """
    shown = []
    for title, records in (x for part in parts for x in sections(part, table.get(part, ()))):
        if rows := rows_of(records):
            lines = [["run", "target", "steps", *COLUMNS], ["---"] * (3 + len(COLUMNS)), *rows]
            body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
            shown.append(f"{title}:\n\n{body}")
    return "\n".join(shown)
