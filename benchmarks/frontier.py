"""Quality against time: what `prune --minutes` makes of so many minutes, method by method.

    python benchmarks/frontier.py OUT --other-text FOLDER --minutes 5,10,20 --cpu
    python benchmarks/frontier.py OUT --show --plot frontier.png

Each row is a run in a process of its own, and a file in OUT: a table that was stopped goes on. With
`--cpu` the minutes are CPU minutes of one thread, for machines that others use too. Judging is part
of a run's minutes; what the table judges by comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RESULTS = Path(__file__).parent / "results" / "frontier.json"
PAGE = Path(__file__).parents[1] / "docs" / "quality.md"
PLACE = re.compile(r"(?<=<!-- minutes -->\n\n).*?(?=\n\n)", re.S)
"""Where the page has the table."""
METHODS = ("surgeon", "taylor", "flap")
"""Rows of a table, the default first; each is a value of `--method`."""
DENSE = "dense.json"


def row_name(row: Mapping[str, Any]) -> str:
    """Return the name of a row's file."""
    share = f"{100 * row['target']:g}"
    return f"{row['method']}_{share}_{row['minutes']:g}-minutes_seed-{row['seed']}.json"


def run_row(row: Mapping[str, Any], cpu: bool, other_text: Path) -> dict[str, Any]:
    """Prune in the minutes of a row, and judge what came out; in a process of its own."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} if cpu else {}
    asked = json.dumps({**row, "cpu": cpu, "other_text": str(other_text)})
    done = subprocess.run(
        [sys.executable, __file__, "--row", asked],
        env={**os.environ, **threads},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def do_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Do what `run_row` asks for."""
    if row["cpu"]:  # before anything reads the clock; waiting takes no time then
        time.monotonic = time.process_time
    import llm_pruner
    import torch
    from quality_text import Judge, Setting

    from nuteprune import load_pruned, prune
    from nuteprune.gates import importance
    from nuteprune.jobs.sources import load_model, load_tokenizer
    from nuteprune.stages.judge import judge_beside

    setting = Setting(model=row["model"], dtype="bfloat16", eval_blocks=12, choose=row["choose"])
    tokenizer = load_tokenizer(row["model"])
    specs, _ = setting.mixture()
    judge = Judge(setting, tokenizer, specs, Path(row["other_text"]))
    dense = load_model(row["model"], torch.bfloat16)
    if row["method"] is None:
        return judge.figures(dense)
    method = row["method"]
    if method == llm_pruner.NAME:  # settings know the package's own methods alone
        method = "taylor"
        importance.METHODS[method] = llm_pruner.METHOD
    with TemporaryDirectory() as folder:
        began = time.monotonic()
        record = prune(
            row["model"],
            data="demo",
            sparsity=row["target"],
            out=folder,
            minutes=row["minutes"],
            method=method,
            seed=row["seed"],
            quiet=True,
            overwrite=True,
        )
        took = time.monotonic() - began
        assert record is not None
        small = load_pruned(folder, dtype=torch.bfloat16)
        beside = judge_beside(dense, small, tokenizer, judge.other, tokens=128, blocks=48)
        return {
            **row,
            "other_text": Path(row["other_text"]).name,
            "took": took,
            "config": record["config"],
            "stages": record["stages"],
            "params": record["params"]["after"],
            **judge.figures(small),
            **{name: beside[name] for name in ("answers", "context") if name in beside},
        }


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows that are asked for, the shortest first."""
    return [
        {
            "model": args.model,
            "method": method,
            "target": target,
            "minutes": minutes,
            "seed": seed,
            "choose": args.choose,
        }
        for minutes in numbers(args.minutes)
        for target in numbers(args.targets)
        for seed in map(int, numbers(args.seeds))
        for method in args.methods.split(",")
    ]


def numbers(text: str) -> list[float]:
    """Return comma separated numbers."""
    return [float(x) for x in text.split(",")]


def figures_of(record: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, float]:
    """Return what a table shows of a row."""
    from quality_text import times_dense

    times = times_dense(record, dense)
    answers = record["answers"]
    [context, *_] = record["context"].values()
    return {
        "steps": record["config"]["max_steps"],
        "other": times["other_mean"],
        "in_domain": times["in_domain"],
        "copies": record["copying"],
        "loops": answers["looping"]["after"],
        "kl": answers["kl"],
        "needing": context["lost"],
        "elsewhere": context["lost_elsewhere"],
    }


def table(records: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> str:
    """Return the rows as Markdown."""
    heads = ("removed", "minutes", "method", "steps", "other text", "in-domain", "copies")
    heads += ("answers that loop", "KL on answers", "lost on tokens that need context", "on others")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for record in sorted(records, key=lambda x: (x["target"], x["minutes"], x["method"])):
        x = figures_of(record, dense)
        cells = [f"{record['target']:.0%}", f"{record['minutes']:g}", record["method"]]
        cells += [f"{x['steps']}", f"{x['other']:.2f} x", f"{x['in_domain']:.2f} x"]
        cells += [f"{x['copies']:.0f} %", f"{x['loops']:.0f} %", f"{x['kl']:.2f}"]
        cells += [f"{x['needing']:.2f}", f"{x['elsewhere']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(
    records: Sequence[Mapping[str, Any]], dense: Mapping[str, Any], path: Path, clock: str
) -> None:
    """Draw other text against minutes at the target of most rows, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    target = statistics.mode(x["target"] for x in records)
    records = [x for x in records if x["target"] == target]
    ticks = sorted({x["minutes"] for x in records})
    # Drawn for a column of 380 pixels: there its text has the size of a page's.
    plt.rcParams["font.size"] = 13
    figure, axes = plt.subplots(figsize=(5, 4))
    methods = sorted({x["method"] for x in records}, key=lambda x: (x != METHODS[0], x))
    for place, method in enumerate(methods):
        own = sorted((x for x in records if x["method"] == method), key=lambda x: x["minutes"])
        points = [(x["minutes"], figures_of(x, dense)["other"]) for x in own]
        name = "NutePrune" if method == METHODS[0] else f"units of {method}"
        [line] = axes.plot(
            *zip(*points, strict=True), marker="o", markersize=9, linewidth=2.5, label=name
        )
        for x, y in points if not place else ():
            axes.annotate(
                f"{y:.2f}",
                (x, y),
                (0, -24),
                textcoords="offset points",
                ha="right" if len(ticks) > 1 and x == ticks[-1] else "left",
                color=line.get_color(),
                weight="bold",
            )
    axes.legend(
        frameon=False, fontsize=11, loc="lower right", bbox_to_anchor=(1, 0.09), labelspacing=0.25
    )
    axes.axhline(1, color="0.3", linestyle=":", linewidth=2)
    axes.annotate("dense model: 1", (ticks[0], 1), (0, 8), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(clock)
    axes.yaxis.set_major_locator(plt.MaxNLocator(4))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=0.35)
    axes.set_ylim(bottom=0.95)
    title = "Perplexity on other text ÷ dense (lower is better)"
    axes.set_title(f"{title}\n{100 * target:g} % of the decoder removed", loc="left", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the rows that are missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--row", type=json.loads)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", default="5,10,20")
    parser.add_argument("--targets", default="0.2")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--other-text", type=Path)
    parser.add_argument("--choose", action="store_true", help="judge by odd lines")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true", help="write the table into docs/quality.md")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(do_row(args.row)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.show:
        everything = {"model": args.model, "method": None, "choose": args.choose}
        todo = {DENSE: everything, **{row_name(x): x for x in rows_of(args)}}
        for name, row in todo.items():
            if not (args.out / name).exists():
                print(name, flush=True)
                found = run_row(row, args.cpu, args.other_text)
                (args.out / name).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    dense = json.loads((args.out / DENSE).read_text("utf-8"))
    records = [json.loads(x.read_text("utf-8")) for x in sorted(args.out.glob("*-minutes_*.json"))]
    print(table(records, dense))
    clock = "CPU minutes of one thread" if args.cpu else "minutes"
    if args.page:
        text = PAGE.read_text("utf-8")
        PAGE.write_text(PLACE.sub(lambda _: table(records, dense), text), "utf-8")
    if args.plot:
        plot(records, dense, args.plot, clock)
    if args.json:
        found = {"clock": clock, "dense": dense, "rows": records}
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
