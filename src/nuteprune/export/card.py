"""The model card: README.md of a pruned checkpoint, made from its record and a template."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

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
    return _TEMPLATES.get_template("card.md").render(
        record=since_dense(record), remote_code=remote_code, paper=_PAPER, plots=_PLOTS
    )


def _metadata(record: Mapping[str, Any]) -> str:
    """Return the hub's metadata as YAML: base model, licence, and the metrics as a model index."""
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
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if record.get("wrapper") else "text-generation",
        tags=["nuteprune", "pruned", "structured-pruning"],
        base_model=base_model if base_model and _is_hub_id(base_model) else None,
        **licence,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def since_dense(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a model pruned several times with the counts of the dense model."""
    if not (history := record.get("history")):
        return dict(record)
    first, counted = history[0], ("before", "blocks_before", "active_before")
    params = record["params"] | {k: x for k, x in first["params"].items() if k in counted}
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
    images = "\n\n".join(f"![{_plain(alt)}]({file})" for alt, file in plots.items())
    place = re.compile(f"{start}.*?{end}", re.DOTALL)
    return place.sub(lambda _: f"{start}\n{images}\n{end}", card, count=1)


def perplexities_of(record: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return perplexities before and after by text, empty where a record has none."""
    found = record.get("perplexity", {})
    before, after = (found.get(when, {}) for when in ("before", "after"))
    # Of one that was not finite JSON says null.
    return tuple({k: v for k, v in x.items() if v is not None} for x in (before, after))  # type: ignore[return-value]


def _judged_by(record: Mapping[str, Any]) -> str:
    """Say which text perplexity was measured on, where that is known."""
    config = record.get("config", {})
    data, runs = config.get("data"), (record.get("recover", {}), config)  # a recovery has its own
    judged = next((str(x["eval_data"]) for x in runs if x.get("eval_data")), data)
    if judged != data:
        return f" of {_shown(judged)}"
    in_domain = data and data not in (SELF, [SELF])
    return " of what it was calibrated on (in-domain)" if in_domain else ""


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
    said = ["text of the dense model's own" if x == SELF else _shown(x) for x in specs]
    if 1 < len(specs) == len(shares := config.get("shares") or ()):
        parts = (share / sum(shares) for share in shares)
        said = [f"{part:.0%} {text}" for part, text in zip(parts, said, strict=True)]
    return ", ".join(said)


def _public(name: str) -> str:
    """Return a name to be shown to anybody: of a path of this machine only its last part."""
    return _short_name(name) if name.startswith(("/", ".", "~")) or Path(name).exists() else name


def _shown(name: str) -> str:
    """Return a name of others' to be shown to anybody, in Markdown."""
    return _plain(_public(name))


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


def figure_rows(record: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return the figures of answers and of context by title, those that a record has."""
    answers, spans = record.get("answers"), record.get("context") or {}
    found = {
        "Answers": _answer_rows(answers) if answers else [],
        "Context": [r for k, x in spans.items() for r in _context_rows(k, x, len(spans) > 1)],
    }
    return {title: rows for title, rows in found.items() if rows}


def _answer_rows(found: Mapping[str, Any]) -> list[Row]:
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


def _context_rows(length: str, found: Mapping[str, Any], several: bool) -> list[Row]:
    of = f", blocks of {length}" if several else ""
    needing, gain = found["needing"], found["gain"]
    others = found["tokens"] - needing
    return [
        Row(f"nats lost, {needing:,} tokens that need it{of}", None, found["lost"], 2),
        Row(f"nats lost, the other {others:,}{of}", None, found["lost_elsewhere"], 2),
        Row(f"nats gained by context{of}", gain["before"], gain["after"], 2),
        Row(f"gain kept, %{of}", None, found["kept"], 1),
    ]


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


_TEMPLATES.filters |= {
    **{"plain": _plain, "public": _public, "shown": _shown, "short_name": _short_name},
    **{"metadata": _metadata, "taught": _taught, "perplexities_of": perplexities_of},
    **{"figure_rows": figure_rows, "definitions": definitions},
    **{"judged_by": _judged_by, "layers": _layers, "calibrated_on": _calibrated_on},
}
"""What the card's template says of a record."""
