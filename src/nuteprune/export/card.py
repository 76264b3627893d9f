"""The model card: README.md of a pruned checkpoint, made from its record."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nuteprune.export.card_metadata import metadata, short_name
from nuteprune.export.figures import answer_rows, context_rows, definitions
from nuteprune.gates.budget import share_gone
from nuteprune.model.shape import SAID
from nuteprune.run_folder import SELF

_PLOTS = "<!-- plots of the run -->", "<!-- end of plots -->"
"""Marks around the plots in a card, so that they can be put in later."""

_CARD = """\
---
{metadata}
---

# {name}, {what}

{base_model} with {removed}{taught}{paper}, made with `nuteprune` {version}.

| | before | after | |
|---|---:|---:|---:|
{table}
{protocol}

{plots}

## How to load

```python
from transformers import {auto}, {reader}

folder = "."  # this checkpoint: a folder, or its id on the hub
{read} = {reader}.from_pretrained(folder{stock})
model = {auto}.from_pretrained(folder{remote})
```

{how}

## What it is made from

- Base model: {base_model}. Intended uses, limits and biases are those of the base model; what was
  removed may add to the latter, and {judged}.
- Licence: {licence}.
- Layers: {layers}
- Text: {text}. {wrapped}{tuned}`nuteprune.json` has all settings, versions and counts.
"""

_PAPER = "\n([arXiv 2402.09773](https://arxiv.org/abs/2402.09773))"
"""Where pruning is described; nothing of it is done to a vocabulary."""

_FREE = """\
The stock class cannot state its sizes, so a short modeling file travels with the weights
(`modeling_pruned.py`: it builds the stock layers at the sizes that `config.json` states). Without
remote code: `from nuteprune import load_pruned; model = load_pruned(folder)`."""

_ALONE = {
    "auto": "AutoModelForCausalLM",
    "reader": "AutoTokenizer",
    "read": "tokenizer",
    "wrapped": "",
}
_WRAPPED = {
    "auto": "AutoModelForImageTextToText",
    "reader": "AutoProcessor",
    "read": "processor",
    "wrapped": "Its language model alone was pruned, and calibration saw no images: what it makes "
    "of\n  them was not judged. All else is the base model's, bit for bit. ",
}
"""Sentences for a language model that is inside of a model of several modalities."""

_STOCK = "It is a model of the stock class: no extra code is needed."


def model_card(record: Mapping[str, Any], *, remote_code: bool) -> str:
    """Return the card's text, with a place for plots (`with_plots`).

    Args:
        record: as `record.make_record` gives it.
        remote_code: whether the checkpoint brings its modeling file.
    """
    record = since_dense(record)
    base_model = _public(record.get("base_model") or "the dense model")
    licence = record.get("license_name") or record.get("license")
    if link := record.get("license_link"):
        licence = f"{licence} ({link})"
    return _CARD.format(
        metadata=metadata(record).to_yaml().strip(),
        name=_plain(short_name(base_model)),
        base_model=_plain(base_model),
        **_said(record),
        taught=_taught(record) + _again(record),
        paper=_PAPER if _taught(record) or record["sparsity"] > 0 else "",
        version=record.get("versions", {}).get("nuteprune", "of an unknown version"),
        table=_table(record),
        judged=_judged(record),
        protocol=_protocols(record),
        plots="\n".join(_PLOTS),
        # Asked nothing, transformers asks whether to run the modeling file, for a tokenizer too.
        stock=", trust_remote_code=False" if remote_code else "",
        remote=", trust_remote_code=True" if remote_code else "",
        how=_FREE if remote_code else _STOCK,
        **(_WRAPPED if record.get("wrapper") else _ALONE),
        licence=f"{_plain(licence)}, that of the base model" if licence else "the base model's",
        layers=_layers(record),
        tuned=_tuned(record),
        text=_calibrated_on(record.get("config", {})),
    )


def _said(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the removed share in words, for the title and for the first sentence."""
    what, removed = [], []
    if (share := record["sparsity"]) > 0:
        what.append(f"{share:.1%} of its decoder removed")
        removed.append(
            f"{share:.1%} of the parameters of its decoder layers' projections physically\nremoved "
            f"({record['total_sparsity']:.1%} of all parameters) by structured pruning"
        )
    vocab = record.get("vocab") or next(
        (x["vocab"] for x in reversed(record.get("history", ())) if "vocab" in x), None
    )
    if vocab:
        what.append(f"a vocabulary of {vocab['after']} tokens")
        removed.append(f"a vocabulary of {vocab['after']} tokens")
    return {"what": ", ".join(what), "removed": " and ".join(removed)}


def _again(record: Mapping[str, Any]) -> str:
    times = len(record.get("history", ())) + 1
    return f", in {times} runs one after the other" if times > 1 else ""


def named_to_judge(record: Mapping[str, Any]) -> str | None:
    """Return the text named to judge by: the last recovery's, else the run's."""
    runs = (record.get("recover", {}), record.get("config", {}))
    return next((str(x["eval_data"]) for x in runs if x.get("eval_data")), None)


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
    every = (*record.get("history", ()), record)
    runs = [x for x in every if x.get("asked", {}).get("kind") != "vocab"]
    found = sorted({teacher for run in runs if (teacher := _teacher(run))})
    return f" with distillation from {' and '.join(found)}" if found else ""


def _teacher(run: Mapping[str, Any]) -> str:
    config = run.get("config", {})
    if config.get("teacher") == "none" or config.get("max_steps") == 0:
        return ""
    return "numerous teachers" if run.get("teachers", {}).get("count") else "the dense model"


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


def _table(record: Mapping[str, Any]) -> str:
    params = record["params"]
    rows = [
        f"| {what} | {params[before]:,} | {params[after]:,} | "
        f"{(params[after] - params[before]) / params[before]:+.1%} |"
        for what, before, after in (
            ("parameters", "before", "after"),
            ("in decoder layers", "blocks_before", "blocks_after"),
            ("active per token", "active_before", "active_after"),
        )
        if before in params and params[before] != params[after]
    ]
    return "\n".join([*rows, *_figures(record)]) + "\n"


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


def _judged(record: Mapping[str, Any]) -> str:
    """Say what the model was judged by."""
    figures = _figures(record)
    return f"has {'been judged by the figures above alone' if figures else 'not been judged'}"


def _protocols(record: Mapping[str, Any]) -> str:
    """Say how the table's figures were measured, and on which text."""
    config, said = record.get("config", {}), []
    if measure := record.get("perplexity", {}).get("protocol", {}).get("measure"):
        data = config.get("data")
        judged = named_to_judge(record)
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
    return short_name(name) if name.startswith(("/", ".", "~")) or Path(name).exists() else name


def _plain(text: str) -> str:
    """Return text escaped for Markdown, on one line."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)
