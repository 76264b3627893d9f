"""Table and picture of what quantizing and pruning cost, from results/quantized.json.

`python benchmarks/quantized_table.py` draws the picture anew, beside the results, which
`benchmarks/quantized.py` measures. `docs/all_tables.py` puts the table into docs/tables.md.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quantized.json"
PICTURE = RESULTS.with_suffix(".png")
PAGE = ROOT / "docs" / "faq.md"
"""The page that says what follows."""

DENSE, PLAIN = "dense", "f16"
"""The model, and the type of its file, by which all of a subject are divided."""
Result = Mapping[str, Any]
Row = Mapping[str, Any]


def ordered(result: Result) -> list[Row]:
    """Return the rows by subject and model, in the order in which these came, the largest first."""
    keys = list(dict.fromkeys((x["subject"], x["model"]) for x in result["rows"]))
    subjects = list(dict.fromkeys(subject for subject, _ in keys))

    def place_of(x: Row) -> tuple[int, int, int]:
        return subjects.index(x["subject"]), keys.index((x["subject"], x["model"])), -x["bytes"]

    return sorted(result["rows"], key=place_of)


def reference(row: Row, result: Result) -> Row:
    """Return the row that others of a subject are divided by."""
    asked = (row["subject"], DENSE, PLAIN)
    return next(x for x in result["rows"] if (x["subject"], x["model"], x["type"]) == asked)


def times_dense(row: Row, result: Result) -> tuple[float, float]:
    """Return perplexity ÷ that of the dense f16 file, the geometric mean over domains, ± its error.

    The error is the standard error over blocks of what each costs, so of the text alone.
    """
    plain = reference(row, result)
    costs = {
        k: [a - b for a, b in zip(x, plain["nats"][k], strict=True)] for k, x in row["nats"].items()
    }
    ratio = math.exp(statistics.fmean(map(statistics.fmean, costs.values())))
    errors = [statistics.variance(x) / len(x) for x in costs.values() if len(x) > 1]
    return ratio, ratio * math.sqrt(sum(errors)) / len(costs)


def speed(row: Row, result: Result, what: str) -> float:
    """Return tokens a second ÷ those of the dense f16 file, the median over rounds.

    Args:
        row: of the results.
        result: all of them.
        what: `prefill` or `decode`.
    """
    plain = reference(row, result)
    return statistics.median(a / b for a, b in zip(row[what], plain[what], strict=True))


def table(result: Result) -> str:
    """Return the rows as a page shows them."""
    lines: list[str] = []
    for x in ordered(result):
        ratio, error = times_dense(x, result)
        is_reference = x is reference(x, result)
        cells = {
            "model": f"{x['subject']}, {x['model']}",
            "file": x["type"].upper(),
            "size": f"{x['bytes'] / 1e6:.0f} MB",
            "bits per weight": f"{x['bits_per_weight']:.1f}",
            "other text": "1" if is_reference else f"{ratio:.3f} ± {error:.3f}",
            "answers that loop": f"{100 * x['looping'] / x['answers']:.0f} %",
            "prefill": f"{speed(x, result, 'prefill'):.2f} x",
            "decode": f"{speed(x, result, 'decode'):.2f} x",
            "matrices stored as": ", ".join(f"{n} {name}" for name, n in x["matrices"].items()),
        }
        lines = lines or [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
        lines.append(f"| {' | '.join(cells.values())} |")
    return "\n".join(lines)


def draw(result: Result, path: Path) -> None:
    """Draw size and perplexity: a panel for each subject, a line for each of its models."""
    names = list(dict.fromkeys(x["subject"] for x in ordered(result)))
    figure, panels = plt.subplots(
        1, len(names), figsize=(5.2 * len(names), 4.6), layout="constrained", squeeze=False
    )
    for axes, subject in zip(panels[0], names, strict=True):
        of_it = [x for x in ordered(result) if x["subject"] == subject]
        for i, model in enumerate(dict.fromkeys(x["model"] for x in of_it)):
            files = [x for x in of_it if x["model"] == model]
            ratios = [times_dense(x, result)[0] for x in files]
            sizes = [x["bytes"] / 1e6 for x in files]
            axes.plot(sizes, ratios, "osD^v"[i % 5] + "-", label=model, alpha=0.8)
            for k, (x, size, ratio) in enumerate(zip(files, sizes, ratios, strict=True)):
                if model != DENSE and 0 < k < len(files) - 1:
                    continue  # the types between have the same order
                # Above and below the line by turns: types of nearly the same size stand apart.
                place = {"xytext": (3, 6)} if k % 2 else {"xytext": (-3, -13), "ha": "right"}
                axes.annotate(
                    x["type"].upper(),
                    (size, ratio),
                    textcoords="offset points",
                    fontsize=8,
                    **place,
                )
        axes.set(title=subject, xlabel="size of the GGUF file, MB")
        axes.set_ylabel("perplexity of other text ÷ dense F16")
        axes.set_yscale("log")
        ticks = (1, 1.2, 1.5, 2, 3, 4)
        axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
        axes.yaxis.set_minor_locator(plt.NullLocator())
        axes.margins(0.1)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Draw the picture anew."""
    draw(json.loads(RESULTS.read_text(encoding="utf-8")), PICTURE)


if __name__ == "__main__":
    main()
