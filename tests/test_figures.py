"""What pages say was measured is what the committed results have.

Generated tables have tests of their own beside their generators; here are rows and sentences that
are written by hand. A new one is a line of `FIGURES`: page, results, text with gaps, what fills it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHORT_TEXTS = "texts of 64 tokens, a quarter chats of up to a block"
FLOOR = {"last_layer": "its neurons cost their median at least"}
SHORT = FLOOR | {"own_text": SHORT_TEXTS}
TODAY = SHORT | {
    "chats": "a quarter",
    "clipped": "to 0.5",
    "prices": "measured at the target",
    "row": "the default, priced",
}
"""What runs of the default had beside today's method, as results have it."""


class Figure(NamedTuple):
    """Text of a page with gaps, and what fills them from a file of results."""

    page: str
    results: str
    text: str
    values: Callable[[Any], Iterable[Any]]


def default(results: Mapping[str, Any], **found: Any) -> list[float]:
    """Return other text, in-domain and copying of the runs that have such keys and no others."""
    dense, kept = results["dense"], ("other", "mean", "copying")
    plain = {"method": "surgeon", "target": 0.2, "steps": 80}
    counted = ("seed", "sparsity", "params", "perplexity", "seconds", *kept)
    runs = [
        run
        for run in results["runs"]
        if {k: x for k, x in run.items() if k not in counted} == plain | found and run["seed"] < 2
    ]
    assert len(runs) == 2
    others = [
        geometric_mean(run["other"][k] / dense["other"][k] for k in run["other"]) for run in runs
    ]
    inside = [run["mean"] / dense["mean"] for run in runs]
    return [fmean(others), fmean(inside), fmean(run["copying"] for run in runs)]


def first_default(results: Mapping[str, Any]) -> float:
    """Return the in-domain text of the default of 0.1.0 at 20 %, as a multiple of dense."""
    runs = [x for x in results["trained"] if x["target"] == 0.2 and x["label"] == "nuteprune"]
    assert [x["steps"] for x in runs] == [80, 80, 80]
    return fmean(x["mean"] for x in runs) / results["dense"]["mean"]


def step(results: Mapping[str, Any], row: str) -> list[float]:
    """Return seconds of a step and its peak in GB, each also over those of `lora`."""
    found = []
    for name, unit in (("seconds", 1), ("memory_bytes", 1e9)):
        kept = results[name]
        ours, lora = (median([kept[x]] if unit > 1 else kept[x]) / unit for x in (row, "lora"))
        found += [ours, ours / lora]
    return found


def bench(results: Mapping[str, Any], figure: str, times: str) -> list[float]:
    """Return medians and half of their ranges in percent: pruned, dense, ratio; and the bound."""
    [setting, *_] = results["settings"]
    gained = setting["speedup"][times]
    found = []
    for x in (*(setting["models"][model][figure] for model in ("small", "demo")), gained):
        found += [x["median"], 50 * (x["high"] - x["low"]) / x["median"]]
    return [*found, gained["bound"]]


def first_seed(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the run whose figures the page of `eval` shows."""
    asked = {"row": "the default, priced", "target": 0.2, "steps": 80, "seed": 0}
    [run] = [x for x in results["runs"] if x | asked == x]
    return run


def beside(name: str, kind: str = "perplexity") -> Callable[[Any], Iterable[float]]:
    """Return what yields a text's perplexities, and the percent retained, of the default."""

    def values(results: Any) -> Iterable[float]:
        ours, dense = first_seed(results)[kind][name], results["dense"][kind][name]
        return ours, dense, 100 * dense / ours

    return values


TUNED = ("intact", "before", "after", "intact_tuned_alike")
QUANTS = "| {} | {:.1f}M | {:.1f} MB | {:.1f} MB | {:.2f} |"
FIGURES = [
    Figure(
        "quality.md",
        "quality-0.1.0/table.json",
        "| not kept | {:.2f} × | not kept | the default of 0.1.0",
        lambda r: [first_default(r)],
    ),
    *(
        Figure(
            "quality.md",
            "default.json",
            f"| {{:.2f}} × | {{:.2f}} × | {{:.0f}} % | {changed}",
            lambda r, found=found: default(r, **found),
        )
        for found, changed in (
            (FLOOR, "half of the text is self-written"),
            (SHORT, "self-written texts end after 64"),
            (TODAY, "units are priced"),
        )
    ),
    *(
        Figure("evaluate.md", "default.json", f" {name} {{:.2f}} {{:.2f}} {{:.1f}} %", beside(name))
        for name in ("wikipedia", "speeches", "recipes")
    ),
    *(
        Figure(
            "evaluate.md",
            "default.json",
            f" {name}.jsonl {{:.2f}} {{:.2f}} {{:.1f}} %",
            beside(name, "other"),
        )
        for name in ("code", "medicine")
    ),
    Figure(
        "evaluate.md",
        "demo-bench.json",
        "prefill tok/s {:.0f} ±{:.0f}% {:.0f} ±{:.0f}% {:.2f} ±{:.0f}% {:.2f}",
        lambda r: bench(r, "prefill_tokens_per_second", "prefill"),
    ),
    Figure(
        "evaluate.md",
        "demo-bench.json",
        "decode tok/s {:.1f} ±{:.0f}% {:.1f} ±{:.0f}% {:.2f} ±{:.0f}% {:.2f}",
        lambda r: bench(r, "decode_tokens_per_second", "decode"),
    ),
    *(
        Figure(
            "recover.md",
            "demo-recover.json",
            f"| {name} | {{:.2f}} | {{:.2f}} | {{:.2f}} | {{:.2f}} |",
            lambda r, name=name: [r[x][name] for x in TUNED],
        )
        for name in ("wikipedia", "speeches", "recipes", "mean")
    ),
    Figure(
        "recover.md",
        "demo-recover.json",
        "the pruned model retains {:.1f} % (the dense model's perplexity ÷ the pruned one's). "
        "After the same tuning of both it retains {:.1f} %.",
        lambda r: (100 * r["retained_before"], 100 * r["retained_after"]),
    ),
    Figure(
        "recover.md",
        "recover-step.json",
        "With {:.2f} of the weights left, a step takes [{:.2f} of the dense model's]",
        lambda r: (r["weights_multiplied_to_dense"], r["ratio"]),
    ),
    *(
        Figure(
            "cost.md",
            file,
            "| {:.2f} | {:.2f} | {:.2f} | {:.2f} |",
            lambda r, row=row: step(r, row),
        )
        for file in ("step.json", "step-50.json")
        for row in ("lora", "nuteprune", "ramp", "teachers", "two_pass", "two_model")
    ),
    *(
        Figure(
            "cost.md",
            "plan.json",
            f"| {phase} | {{:.0f}} | {{:.0f}} |",
            lambda r, phase=phase: (r[0][x][phase] / 1e6 for x in ("planned", "measured")),
        )
        for phase in ("judge", "score", "refit", "teach", "slice", "save")
    ),
    *(
        Figure(
            "few-bytes.md",
            "k-quants.json",
            QUANTS,
            lambda r, i=i, name=name: (
                name,
                r["rows"][i]["parameters"] / 1e6,
                r["rows"][i]["f16_bytes"] / 1e6,
                r["rows"][i]["q4_k_m_bytes"] / 1e6,
                r["rows"][i]["bits_per_weight"],
            ),
        )
        for i, name in enumerate(("dense", "cut", "cut with `--set for_quantization=true`"))
    ),
    *(
        Figure(
            "few-bytes.md",
            "vocabulary-gemma.json",
            f"| {name} | {{:.2f}} | {{:.2f}} | {{:.2f}} | {{:.2f}} |",
            lambda r, name=name: [x[name.replace(",", "")]["times"] for x in r["rows"]],
        )
        for name in ("65,536", "32,768")
    ),
    Figure(
        "size.md",
        "demo-bench.json",
        "| {:.1f}M | {:.0f} % | {:.1f}M (-{:.1f} %) |",
        lambda r: (
            r["models"]["demo"]["parameters"] / 1e6,
            100 * r["models"]["demo"]["blocks"] / r["models"]["demo"]["parameters"],
            r["models"]["small"]["parameters"] / 1e6,
            100 * (1 - r["models"]["small"]["parameters"] / r["models"]["demo"]["parameters"]),
        ),
    ),
]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda x: f"{x.page}-{x.results}")
def test_the_page_says_what_the_results_have(figure: Figure) -> None:
    results = json.loads((RESULTS / figure.results).read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs" / figure.page).read_text(encoding="utf-8").split())
    expected = " ".join(figure.text.format(*figure.values(results)).split())
    assert expected in page


def test_a_figure_that_changed_is_found() -> None:
    [figure] = [x for x in FIGURES if x.results == "recover-step.json"]
    changed = {"weights_multiplied_to_dense": 0.5, "ratio": 0.8}
    page = " ".join((ROOT / "docs" / figure.page).read_text(encoding="utf-8").split())
    assert figure.text.format(*figure.values(changed)) not in page
