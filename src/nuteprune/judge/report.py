"""The report of a run: one self-contained HTML page, and its plots as PNG for the model card."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from nuteprune.export.card import with_plots
from nuteprune.export.figures import definitions
from nuteprune.files import atomic, write_text, writing
from nuteprune.judge import plots
from nuteprune.judge.drawing import POINTS, Plot, percent
from nuteprune.judge.headline import headline, judged_on_both, verdict
from nuteprune.judge.plots import LayerRow
from nuteprune.judge.run_files import RunFiles, pruning_steps, read_run, teacher_sparsities
from nuteprune.judge.units import count, duration, size
from nuteprune.model.shape import MLP_COUNTS, SAID
from nuteprune.run_folder import CARD, REPORT

PLOTS = "plots"
"""Folder of the PNG files, beside the report."""

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # no part of an HTML page


Again = Callable[[Mapping[str, Any], str], tuple[list[list[str]], str]]
"""From a record (empty if there is none) and a folder's name to the commands, each in parts that
fit a line, and the settings in YAML that make it again."""


def write_report(folder: Path, again: Again) -> Path:
    """Write the report of a run, its plots, and these into the model card if there is one.

    Args:
        folder: the output folder of `prune`, or its run/ folder; see `run_files` for what is read.
        again: tells how to make the run again.

    Returns:
        The HTML file, run/report.html.

    Raises:
        UserError: if there is no run, a file of it is damaged, or nothing can be written there.
        RunFailed: if writing went wrong on the way, as where the disk is full.
    """
    files = read_run(Path(folder))
    drawn = {plot.name: plot for plot in _drawn(files)}
    page = render(files, drawn, again)
    target = files.run / REPORT
    with writing(f"the report to {files.run}"):
        (files.run / PLOTS).mkdir(parents=True, exist_ok=True)
        for plot in drawn.values():
            with atomic(files.run / PLOTS / f"{plot.name}.png") as partial:
                partial.write_bytes(plot.png)
        with atomic(target) as partial:
            partial.write_bytes(_UNPRINTABLE.sub("\ufffd", page).encode("utf-8", "replace"))
        _complete_card(files, drawn)
    return target


def _drawn(files: RunFiles) -> Iterator[Plot]:
    """Yield the plots that a run has data for."""
    if files.record is not None:
        before, after = judged_on_both(files.record)
        if before:
            yield plots.perplexity_plot(before, after)
        yield plots.layers_plot(kept_rows(files.record))
    if pruning_steps(files) and _ramped(files.metrics):  # else a level line
        yield plots.sparsity_plot(files.metrics, teacher_sparsities(files))
    if files.metrics:
        yield plots.loss_plot(files.metrics)
    for kind, (scores, kept) in files.gates.items():
        yield plots.gates_plot(kind, scores, kept)


def kept_rows(record: Mapping[str, Any]) -> list[LayerRow]:
    """Return the counts of each layer, a row per kind; KV heads where they tell more than heads."""
    before, after = record["layers_before"], record["layers"]

    def row(name: str, key: str) -> LayerRow:
        return LayerRow(name, [x.get(key, 0) for x in after], [x.get(key, 0) for x in before])

    heads, groups = row("heads", "heads"), row("KV heads", "kv_heads")
    alike = all(
        h * gb == g * hb
        for h, hb, g, gb in zip(heads.kept, heads.before, groups.kept, groups.before, strict=True)
    )
    inner = [x for x in MLP_COUNTS if any(layer.get(x) for layer in before)]
    return [heads, *([] if alike else [groups]), *(row(SAID[x], x) for x in inner)]


def render(files: RunFiles, drawn: Mapping[str, Plot], again: Again) -> str:
    """Return the page of a run.

    Args:
        files: the run.
        drawn: its plots by name.
        again: tells how to make the run again.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nuteprune.judge"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "count": count,
        "size": size,
        "duration": duration,
        "yaml": lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True),
    }
    record = files.record
    commands, recipe = again(record or {}, files.folder.name)
    return environment.get_template("report.html").render(
        name=str((record or {}).get("base_model") or files.folder.name),
        record=record,
        verdict=verdict(files),
        table=headline(record, files.speed) if record else [],
        definitions=definitions(record or {}),
        rows=kept_rows(record) if record else [],
        files=files,
        last=files.metrics[-1] if files.metrics else None,
        teachers=teacher_sparsities(files),
        plots=drawn,
        points=POINTS,
        gates=[plot for name, plot in drawn.items() if name.startswith("gates_")],
        ramped=pruning_steps(files) and _ramped(files.metrics),
        commands=commands,
        recipe=recipe,
    )


def _ramped(metrics: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether sparsity grew during the steps; it may have been there from the first on."""
    reached = [line["sparsity"] for line in metrics if line.get("sparsity") is not None]
    return bool(reached and reached[0] < reached[-1] - 1e-3)


def _complete_card(files: RunFiles, drawn: Mapping[str, Plot]) -> None:
    """Put the plots into the model card, where it keeps a place for them."""
    path = files.folder / CARD
    if files.record is None or not path.is_file():
        return
    given = {
        plot.alt: (files.run / PLOTS / f"{plot.name}.png").relative_to(files.folder).as_posix()
        for plot in drawn.values()
    }
    card = path.read_text(encoding="utf-8")
    complete = with_plots(card, given)
    if complete != card:
        write_text(path, complete)
