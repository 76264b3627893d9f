"""The report of a run: one self-contained HTML page, and its plots as PNG for the model card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from nuteprune.data.fingerprint import text_kind
from nuteprune.export.card import definitions, figure_rows, perplexities_of, since_dense, with_plots
from nuteprune.files import atomic, write_text, writing
from nuteprune.gates.budget import share_gone
from nuteprune.judge import plots
from nuteprune.judge.perplexity import mean
from nuteprune.judge.plots import (
    POINTS,
    THIN,
    LayerRow,
    Plot,
    count,
    duration,
    number,
    percent,
    size,
)
from nuteprune.judge.run_files import RunFiles, pruning_steps, read_run
from nuteprune.model.shape import MLP_COUNTS, SAID
from nuteprune.run_folder import CARD, REPORT

PLOTS = "plots"
"""Folder of the PNG files, beside the report."""

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # no part of an HTML page


BOOKKEEPING = frozenset({"model", "save_steps", "save_total_limit", "dataloader_pin_memory"})
"""What a record keeps of a run's settings that changes no result, and the model."""
TUNED = (
    *("data", "text_column", "template", "eval_data", "steps", "batch_size", "length"),
    *("learning_rate", "lora_rank", "dtype", "seed"),
)
"""What a record keeps of a recovery that is an option of `recover`."""


def write_report(folder: Path) -> Path:
    """Write the report of a run, its plots, and these into the model card if there is one.

    Args:
        folder: the output folder of `prune`, or its run/ folder; see `run_files` for what is read.

    Returns:
        The HTML file, run/report.html.

    Raises:
        UserError: if there is no run, a file of it is damaged, or nothing can be written there.
        RunFailed: if writing went wrong on the way, as where the disk is full.
    """
    files = read_run(Path(folder))
    drawn = {plot.name: plot for plot in _drawn(files)}
    page = render(files, drawn)
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
        yield plots.layers_plot(kept_rows(files.record))
    if files.metrics:
        yield plots.loss_plot(files.metrics)


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


def render(files: RunFiles, drawn: Mapping[str, Plot]) -> str:
    """Return the page of a run.

    Args:
        files: the run.
        drawn: its plots by name.
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
    record = files.record or {}
    return environment.get_template("report.html").render(
        name=str(record.get("base_model") or files.folder.name),
        record=record,
        verdict=verdict(files),
        table=headline(record, files.speed) if record else [],
        definitions=definitions(record),
        rows=kept_rows(record) if record else [],
        files=files,
        last=files.metrics[-1] if files.metrics else None,
        taught=any("token_kl" in line for line in files.metrics),
        plots=drawn,
        points=POINTS,
        settings=settings(record),
        recoveries=list(recoveries(record)),
    )


def settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run, as `--config` reads them: with its seed, without the model."""
    given = dict(record.get("config", {}))
    if given and "keep" not in given:  # `vocab` draws nothing
        given["seed"] = record.get("seed")
    return {x: value for x, value in given.items() if x not in BOOKKEEPING and value is not None}


def recoveries(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the options of each `recover` after the run, the first one first."""
    entry = record.get("recover")
    if entry:
        yield from recoveries({"recover": entry.get("earlier")})
        yield {x: entry[x] for x in TUNED if entry.get(x) is not None}


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


# -- the top of the page: a sentence on the result, and the table of figures


def verdict(files: RunFiles) -> str:
    """Return a sentence that says how a run came out."""
    record = files.record
    if record is None:
        last = files.metrics[-1]
        if (files.folder / "config.json").is_file():
            return (
                f"This model was trained for {last['step']} steps; there is no nuteprune.json, so "
                "it was not pruned by nuteprune."
            )
        at = f", at a sparsity of {percent(last['sparsity'], 1)}" if pruning_steps(files) else ""
        return f"This run has not been finished: its last step on record is {last['step']}{at}."
    parts = [
        f"{percent(record['sparsity'], 1)} of the decoder is gone, "
        f"{percent(record['total_sparsity'], 1)} of all parameters"
    ]
    if record.get("history"):
        whole = since_dense(record)
        parts[0] += (
            f" (with the runs before, {percent(whole['sparsity'], 1)} and "
            f"{percent(whole['total_sparsity'], 1)} of the dense model)"
        )
    if "recover" in record:
        tuned = record["recover"]
        parts.append(f"it was fine-tuned for {tuned['steps']:,} steps on {tuned['data']}")
    before, after = judged_on_both(record)
    if before:
        ratio = mean(after) / mean(before)
        kind = text_kind(record) or "text"
        whose = "what it was before this run" if record.get("history") else "the dense model's"
        parts.append(f"perplexity on held-out {kind} is {number(ratio)}{THIN}× {whose}")
    if copied := _both(record.get("copying", {})):
        then, now = (f"{number(share)}{THIN}%" for share in copied)
        parts.append(f"it copies {now} of random tokens from its context ({then} before)")
    if loops := _both(record.get("answers", {}).get("looping", {})):
        then, now = (f"{number(share)}{THIN}%" for share in loops)
        parts.append(f"{now} of its answers loop ({then} of the dense model's)")
    if gains := told_gains(files.speed):
        span = dict.fromkeys((number(gains[0]), number(gains[-1])))
        parts.append(f"it runs {' to '.join(span)}{THIN}× as fast")
    # A run stores what it reached; rounding errors of its division are none of the reader's.
    missed = record["sparsity"] < record["target"] - 1e-9
    ending = f" The target of {percent(record['target'], 1)} was missed." if missed else ""
    *most, final = parts
    return (f"{'; '.join(most)}; and {final}" if most else final) + "." + ending


def headline(
    record: Mapping[str, Any], speed: Mapping[str, Any] | None
) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """Return the headline table: groups of rows (what, dense, pruned, change)."""
    params = record["params"]
    cells = [
        _counted("all parameters", params["before"], params["after"], count),
        _counted("in the decoder layers", params["blocks_before"], params["blocks_after"], count),
    ]
    if "active_before" in params:
        active = (params["active_before"], params["active_after"])
        cells.append(_counted("active per token", *active, count))
    if "bytes_on_disk" in record:
        # The dtype is kept, so the dense file has the same bytes per parameter.
        dense = record["bytes_on_disk"] / params["after"] * params["before"]
        what, old, new, change = _counted("on disk", dense, record["bytes_on_disk"], size)
        cells.append((what, f"≈{THIN}{old}", new, change))
    hidden = record["hidden"]
    if hidden["before"] != hidden["after"]:
        cells.append(_counted("width", hidden["before"], hidden["after"], "{:,}".format))
    groups = [("Size", cells)]
    before, after = judged_on_both(record)
    if before:
        rows = [_compared(x, before[x], after[x]) for x in before]
        if len(before) > 1:
            rows.append(_compared("mean", mean(before), mean(after)))
        kind = text_kind(record)
        title = f"Perplexity on {kind}" if kind else "Perplexity"
        groups.append((f"{title}, lower is better", rows))
    if copied := _both(record.get("copying", {})):
        row = _compared(f"tokens right,{THIN}%", *copied)
        groups.append(("Copying from context, higher is better", [row]))
    for group, figures in figure_rows(record).items():
        groups.append((group, [(*x.cells, _change(x.dense, x.pruned)) for x in figures]))
    if speed and speed["rows"]:
        rows = [
            (f"{x['name']}, {x['unit']}", number(x["dense"]), number(x["pruned"]), _gain(x))
            for x in speed["rows"]
        ]
        groups.append(("Speed", rows))
    return groups


def _both(figure: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return a figure before and after, None unless both are known."""
    before, after = figure.get("before"), figure.get("after")
    return None if before is None or after is None else (before, after)


def judged_on_both(record: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return perplexities by source, of those that were measured on both models."""
    before, after = perplexities_of(record)
    both = [source for source in before if source in after]
    return {x: before[x] for x in both}, {x: after[x] for x in both}


def _counted(what: str, before: float, after: float, show: Any) -> tuple[str, str, str, str]:
    return what, show(before), show(after), f"−{percent(share_gone(before, after), 1)}"


def _compared(what: str, before: float, after: float) -> tuple[str, str, str, str]:
    return what, number(before), number(after), _change(before, after)


def _change(before: float | None, after: float | None) -> str:
    return f"×{THIN}{number(after / before)}" if before and after is not None else ""


def told_gains(speed: Mapping[str, Any] | None) -> list[float]:
    """Return the gains in speed that a headline may state, growing; none if a row is doubtful.

    Gains within their spread are doubtful, and gains beyond their bound. Leaving out the doubtful
    rows alone would pick the best.
    """
    rows = [row for row in (speed or {}).get("rows", []) if row["better"] == "higher"]
    if not all(row["verdict"] in ("faster", "slower") for row in rows):
        return []
    return sorted(row["gain"] for row in rows)


def _gain(row: Mapping[str, Any]) -> str:
    """Return a row's gain as the table shows it."""
    if row["verdict"] in ("none", "noise"):
        from nuteprune.judge import bench  # few runs time anything

        return bench.say_ratio({**row, "median": row["gain"]})
    return f"×{THIN}{number(row['gain'])}"
