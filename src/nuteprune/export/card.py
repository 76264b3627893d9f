"""The model card: README.md of a pruned checkpoint, made from its record and a template."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from nuteprune.export.record_form import answer_rows, context_rows, definitions
from nuteprune.files import at_home
from nuteprune.gates.budget import share_gone
from nuteprune.model.shape import SAID
from nuteprune.run_folder import CARD, SELF

LICENCE = ("license", "license_name", "license_link")
"""What the hub's cards say of a licence; the latter two where it has no name for it (`other`)."""
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("nuteprune.export"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
_PLOTS = "<!-- plots of the run -->", "<!-- end of plots -->"
"""Marks around the plots in a card, so that they can be put in later."""
_PAPER = "\n([arXiv 2402.09773](https://arxiv.org/abs/2402.09773))"
"""Where pruning is described; nothing of it is done to a vocabulary."""


def inherited_licence(base_model: str | None) -> dict[str, str | None]:
    """Return the licence from the base model's card; `license` is None if it states none.

    Args:
        base_model: a checkpoint folder or a hub id; anything else has no card.
    """
    unknown: dict[str, str | None] = {"license": None}
    if not base_model:
        return unknown
    local = at_home(base_model) / CARD
    if not local.is_file() and not _is_hub_id(base_model):
        return unknown
    try:
        source = local if local.is_file() else base_model
        data = ModelCard.load(source, ignore_metadata_errors=True).data
    except Exception:  # no network, no card, a damaged one: the licence is the base model's anyway
        return unknown
    return unknown | {key: x for key in LICENCE if isinstance(x := data.get(key), str)}


def model_card(record: Mapping[str, Any], *, remote_code: bool) -> str:
    """Return the card's text, with a place for plots (`with_plots`).

    Args:
        record: as `record.write_pruned` makes it.
        remote_code: whether the checkpoint brings its modeling file.
    """
    record = since_dense(record)
    base_model = _public(record.get("base_model") or "the dense model")
    licence = record.get("license_name") or record.get("license")
    if link := record.get("license_link"):
        licence = f"{licence} ({link})"
    what, removed = _said(record)
    taught, figures = _taught(record), _figures(record)
    return _TEMPLATES.get_template("card.md").render(
        remote_code=remote_code,
        wrapped=bool(record.get("wrapper")),
        metadata=_metadata(record).to_yaml().strip(),
        name=_plain(_short_name(base_model)),
        base_model=_plain(base_model),
        what=what,
        removed=removed,
        taught=taught,
        runs=1 + len(record.get("history", ())),
        paper=_PAPER if taught or record["sparsity"] > 0 else "",
        version=record.get("versions", {}).get("nuteprune", "of an unknown version"),
        rows=[*_counts(record), *figures],
        protocols=_protocols(record),
        plots=_PLOTS,
        figures=figures,
        licence=licence and _plain(licence),
        layers=_layers(record),
        text=_calibrated_on(record.get("config", {})),
        tuned=_tuned(record),
    )


def _metadata(record: Mapping[str, Any]) -> ModelCardData:
    """Return the hub's metadata: base model, licence, and the metrics as a model index."""
    base_model = record.get("base_model")
    after = record.get("perplexity", {}).get("after", {})
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source,
            dataset_name=f"{source} (held-out part)",
            metric_type="perplexity",
            metric_name="perplexity",
            metric_value=value,
        )
        for source, value in after.items()
    ]
    licence: dict[str, Any] = {key: record.get(key) for key in LICENCE}
    name = f"{_short_name(base_model or 'model')}-pruned-{round(100 * record['sparsity'])}"
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if record.get("wrapper") else "text-generation",
        tags=["nuteprune", "pruned", "structured-pruning"],
        base_model=base_model if base_model and _is_hub_id(base_model) else None,
        **licence,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _said(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return what was removed in words, for the title and for the first sentence."""
    what, removed = [], []
    if (share := record["sparsity"]) > 0:
        what.append(f"{share:.1%} of its decoder removed")
        removed.append(
            f"{share:.1%} of the parameters of its decoder layers' projections physically\nremoved "
            f"({record['total_sparsity']:.1%} of all parameters) by structured pruning"
        )
    runs = (record, *reversed(record.get("history", ())))
    if vocab := next((x["vocab"] for x in runs if "vocab" in x), None):
        fewer = f"a vocabulary of {vocab['after']} tokens"
        return [*what, fewer], [*removed, fewer]
    return what, removed


def since_dense(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a model pruned several times with the counts of the dense model."""
    if not (history := record.get("history")):
        return dict(record)
    first, params = history[0], {**record["params"]}
    for key in ("before", "blocks_before", "active_before"):
        if key in first["params"]:
            params[key] = first["params"][key]
    return {
        **record,
        "params": params,
        "sparsity": share_gone(params["blocks_before"], params["blocks_after"]),
        "total_sparsity": share_gone(params["before"], params["after"]),
        "layers_before": first["layers_before"],
        "hidden": {"before": first["hidden"]["before"], "after": record["hidden"]["after"]},
    }


def _taught(record: Mapping[str, Any]) -> str:
    """Say which teachers pruning runs had; cutting a vocabulary has none."""
    found = set()
    for run in (*record.get("history", ()), record):
        config, asked = run.get("config", {}), run.get("asked", {}).get("kind")
        if config.get("teacher") != "none" and config.get("max_steps") != 0 and asked != "vocab":
            several = run.get("teachers", {}).get("count")
            found.add("numerous teachers" if several else "the dense model")
    return f" with distillation from {' and '.join(sorted(found))}" if found else ""


def with_plots(card: str, plots: Mapping[str, str]) -> str:
    """Return a card with plots in the place that it keeps for them; other cards stay as they are.

    Args:
        card: text that `model_card` made, perhaps edited since.
        plots: description of a plot -> its file, relative to the card.
    """
    start, end = _PLOTS
    head, found, rest = card.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        return card
    images = "\n\n".join(f"![{_plain(alt)}]({file})" for alt, file in plots.items())
    return f"{head}{start}\n{images}\n{end}{tail}"


def _counts(record: Mapping[str, Any]) -> list[str]:
    """Return the rows of parameters that have changed."""
    params = record["params"]
    return [
        f"| {what} | {params[before]:,} | {params[after]:,} | "
        f"{(params[after] - params[before]) / params[before]:+.1%} |"
        for what, before, after in (
            ("parameters", "before", "after"),
            ("in decoder layers", "blocks_before", "blocks_after"),
            ("active per token", "active_before", "active_after"),
        )
        if before in params and params[before] != params[after]
    ]


def _figures(record: Mapping[str, Any]) -> list[str]:
    """Return the rows that say how well the model does."""
    ppl, copying = record.get("perplexity", {}), record.get("copying", {})
    since = " of the last run" if record.get("history") else ""
    rows = [
        f"| perplexity{since}, {_plain(source)} | {old:.2f} | {ppl['after'][source]:.2f} | "
        f"× {ppl['after'][source] / old:.2f} |"
        for source, old in ppl.get("before", {}).items()
        if None not in (old, ppl.get("after", {}).get(source))
    ]
    old, new = copying.get("before"), copying.get("after")
    if old is not None and new is not None:
        change = f"× {new / old:.2f}" if old else ""
        rows.append(f"| copying{since}, tokens right | {old:.1f} % | {new:.1f} % | {change} |")
    groups = {"answers": answer_rows(record), "context": context_rows(record)}
    for group, figures in groups.items():
        rows += [f"| {group}{since}, {' | '.join(x.cells)} | |" for x in figures]
    return rows


def _protocols(record: Mapping[str, Any]) -> str:
    """Say how the table's figures were measured, and on which text."""
    config, said = record.get("config", {}), []
    if measure := record.get("perplexity", {}).get("protocol", {}).get("measure"):
        data = config.get("data")
        runs = (record.get("recover", {}), config)  # a recovery judges by its own
        judged = next((str(x["eval_data"]) for x in runs if x.get("eval_data")), None)
        in_domain = data and data not in (SELF, [SELF])
        text = " of what it was calibrated on (in-domain)" if in_domain else ""
        if judged not in (None, data):
            text = f" of {_plain(_public(judged))}"
        said.append(f"Perplexity, on held-out text{text}: {measure}.")
        if "vocab" in record:
            said.append("Quality before is that of the base model with the smaller vocabulary.")
    if how := record.get("copying", {}).get("protocol"):
        said.append(f"Copying from context: {how['measure']}; {how['tokens']:,} tokens.")
    listed = "".join(f"\n- {_plain(x)}" for x in definitions(record))
    return " ".join(said) + (f"\n{listed}" if listed else "")


def _tuned(record: Mapping[str, Any]) -> str:
    """Say what it was fine-tuned on after or between prunings, if it was."""
    runs = [(x, "between") for x in record.get("history", ())] + [(record, "afterwards")]
    return "".join(
        f"Fine-tuned {when}: {x['recover']['steps']:,} steps on "
        f"{_plain(_public(x['recover']['data']))}. "
        for x, when in runs
        if "recover" in x
    )


def _layers(record: Mapping[str, Any]) -> str:
    """Say what the layers kept, in one line."""
    before, after = record["layers_before"], record["layers"]
    parts = []
    for key, what in {**SAID, "heads": "query heads"}.items():
        pairs = zip(before, after, strict=False)
        kept = [new.get(key, 0) for old, new in pairs if old.get(key)]
        if not kept:  # there never were any
            continue
        low, high, had = min(kept), max(kept), max(layer.get(key, 0) for layer in before)
        parts.append(f"{low if low == high else f'{low} to {high}'} of {had} {what}")
    hidden = record["hidden"]
    return f"{len(after)}, with {', '.join(parts)}; width {hidden['after']} of {hidden['before']}."


def _calibrated_on(config: Mapping[str, Any]) -> str:
    """Return the text a model was calibrated and trained on, with recorded shares."""
    data = config.get("data", "not on record")
    specs = [data] if isinstance(data, str) else [str(spec) for spec in data]
    said = [
        "text of the dense model's own" if spec == SELF else _plain(_public(spec)) for spec in specs
    ]
    if 1 < len(specs) == len(shares := config.get("shares") or ()):
        parts = (share / sum(shares) for share in shares)
        said = [f"{part:.0%} {text}" for part, text in zip(parts, said, strict=True)]
    return ", ".join(said)


def _public(name: str) -> str:
    """Return a name to be shown to anybody: of a path of this machine only its last part."""
    return _short_name(name) if name.startswith(("/", ".", "~")) or Path(name).exists() else name


def _plain(text: str) -> str:
    """Return text escaped for Markdown, on one line."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)


def _short_name(model: str) -> str:
    """Return the last part of a path or hub id."""
    return model.rstrip("/").rpartition("/")[2]


def _is_hub_id(model: str) -> bool:
    """Return whether a name has the form owner/model and is no folder here."""
    is_one = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model)  # neither ./model nor ../model
    return bool(is_one) and not Path(model).exists()
