"""The quality table: pruned models side by side, by held-out perplexity, size and time.

    python benchmarks/quality.py                    # the whole table: some ten hours on two cores
    python benchmarks/quality.py --quick            # a small one: a quarter of an hour, reckoned
    python benchmarks/quality.py --only ablation    # one part: untrained, trained or ablation
    python benchmarks/quality.py --show             # what has been run so far; runs nothing

Each run is a JSON file written as it ends, and a started table goes on where it stopped. Runs use
the package's own methods, so all share units, budget, re-fit and distillation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from quality_plots import draw
from quality_runs import Bench, Cell, Setting, write_json

from nuteprune import UserError
from nuteprune.cli.app import quiet_libraries
from nuteprune.console import Output, millions
from nuteprune.gates.importance import METHODS
from nuteprune.jobs.settings import read_given
from nuteprune.jobs.sources import pick_device
from nuteprune.train.config import METHOD, NutePruneConfig

OURS = "nuteprune"
BLOCKS = "attn_block,mlp_block"
ABLATION: dict[str, dict[str, Any]] = {
    "no distillation": {"teachers": "none"},
    "half ramp, numerous teachers": {"ramp_share": 0.5},
    "half ramp, dense teacher": {"ramp_share": 0.5, "teachers": "dense"},
    "hard-concrete gates": {"gate_type": "hard_concrete"},
    "rank 128": {"lora_rank": 128},
    "no re-fit": {"compensation": False},
    "uniform shapes": {"shapes": "uniform"},
    "+hidden": {"gates": "kv_groups,neurons,hidden"},
    "blocks only": {"gates": BLOCKS},
}
"""One factor at a time: what differs from the default."""


def ranked_by(name: str) -> dict[str, Any]:
    """Return the settings of a row: a method's, or the default's."""
    return {"method": METHOD if name == OURS else name}


@dataclass(frozen=True)
class Plan:
    """Which cells a table has.

    Args:
        methods: one-shot methods, untrained, at `targets`, for `seeds`.
        targets: of the untrained part.
        seeds: of the untrained and of the trained part.
        trained: methods trained for `steps` at `trained_targets`, for `seeds`.
        trained_once: the same for the first seed alone.
        trained_targets: of the trained part.
        steps: of the trained part and the ablation.
        long_steps: the default against the best baseline, at the last trained target; 0: none.
        long_factors: which of the factors are run for so long too.
        ablation: factors to vary, at the last trained target, for the first seed.
    """

    methods: Sequence[str] = tuple(METHODS)
    targets: Sequence[float] = (0.1, 0.2, 0.25, 0.5)
    seeds: Sequence[int] = (0, 1, 2)
    trained: Sequence[str] = (OURS, "fisher", "taylor", "random")
    trained_once: Sequence[str] = ("magnitude", "wanda", "flap", "similarity")
    trained_targets: Sequence[float] = (0.2, 0.5)
    steps: int = 80
    long_steps: int = 400
    long_factors: Sequence[str] = ("half ramp, numerous teachers",)
    ablation: dict[str, dict[str, Any]] = field(default_factory=lambda: ABLATION)

    def untrained_cells(self) -> list[Cell]:
        """Return a cell for each method, seed and target."""
        return [
            Cell(m, {"method": m}, t, 0, s)
            for s in self.seeds
            for m in self.methods
            for t in self.targets
        ]

    def trained_cells(self) -> list[Cell]:
        """Return a cell for each trained method, target and seed."""
        return [
            Cell(m, ranked_by(m), t, self.steps, s)
            for s in self.seeds
            for t in self.trained_targets
            for m in (*self.trained, *(self.trained_once if s == self.seeds[0] else ()))
        ]

    def long_cells(self, best: str) -> list[Cell]:
        """Return the long runs: the default, the best baseline, and some factors."""
        if not self.long_steps:
            return []
        target, seed = self.trained_targets[-1], self.seeds[0]
        rows = {m: ranked_by(m) for m in (OURS, best)}
        rows |= {name: self.ablation[name] for name in self.long_factors}
        return [Cell(name, x, target, self.long_steps, seed) for name, x in rows.items()]

    def ablation_cells(self) -> list[Cell]:
        """Return the default, which the trained part has too, and a cell for each factor."""
        target, seed = self.trained_targets[-1], self.seeds[0]
        rows = {OURS: ranked_by(OURS), **self.ablation}
        return [Cell(name, x, target, self.steps, seed) for name, x in rows.items()]


QUICK = Plan(
    targets=(0.5,),
    seeds=(0,),
    trained=(OURS, "fisher"),
    trained_once=(),
    trained_targets=(0.5,),
    steps=20,
    long_steps=0,
    ablation={"hard-concrete gates": ABLATION["hard-concrete gates"]},
)
QUICK_SETTINGS = {"calibration_blocks": 12}
QUICK_EVAL_BLOCKS = 4
PARTS = ("untrained", "trained", "ablation")


def run(
    plan: Plan, bench: Bench, output: Output, parts: Sequence[str] = PARTS, show: bool = False
) -> dict[str, Any]:
    """Run what is missing of a table, print it, and write it and its plots beside the cells.

    Args:
        plan: which cells.
        bench: runs them.
        output: prints.
        parts: which parts of the plan.
        show: leave out what is missing instead of running it.

    Returns:
        What `table.json` holds.

    Raises:
        UserError: if there is nothing to show.
    """
    if show and not bench.begun:
        raise UserError(f"nothing has been run in {bench.folder} yet")

    def records_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
        return [bench.run(cell) for cell in cells if bench.has(cell) or not show]

    dense = bench.dense()
    print_dense(dense, bench.setting, output)
    records: dict[str, list[dict[str, Any]]] = {}
    if "untrained" in parts:
        records["untrained"] = records_of(plan.untrained_cells())
        print_untrained(records["untrained"], plan, output)
    if "trained" in parts:
        found = records_of(plan.trained_cells())
        found += records_of(plan.long_cells(best_baseline(found, plan)))
        records["trained"] = found
        print_trained("Trained", found, dense, output)
    if "ablation" in parts:
        records["ablation"] = records_of(plan.ablation_cells())
        print_trained("One factor at a time", records["ablation"], dense, output)
    file = bench.folder / "table.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    table = {**earlier, "dense": dense, **records}
    write_json(bench.folder / "table.json", table)
    drawn = [x for part in ("untrained", "trained") for x in records.get(part, [])]
    files = draw(drawn, dense, bench.folder) if drawn else []
    output.line(f"Written: {', '.join(str(f) for f in (bench.folder / 'table.json', *files))}")
    return table


def best_baseline(records: Sequence[dict[str, Any]], plan: Plan) -> str:
    """Return the one-shot method of least mean perplexity at the last target."""
    found: dict[str, list[float]] = {}
    for record in records:
        last = record["target"] == plan.trained_targets[-1] and "mean" in record
        if last and record["label"] != OURS:
            found.setdefault(record["label"], []).append(record["mean"])
    return min(found, key=lambda name: statistics.fmean(found[name])) if found else OURS


def print_dense(dense: dict[str, Any], setting: Setting, output: Output) -> None:
    """Print what is pruned and judged by."""
    machine = dense["machine"]
    each = ", ".join(f"{name} {x:.2f}" for name, x in dense["perplexity"].items())
    output.line(
        f"{setting.model}: {millions(dense['params'])} parameters; held-out perplexity "
        f"{dense['mean']:.2f} ({each}), up to {setting.eval_blocks} x {setting.length} tokens each"
    )
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


def print_untrained(records: Sequence[dict[str, Any]], plan: Plan, output: Output) -> None:
    """Print means over sources, without and with re-fit: a row per method, columns per target."""
    if not records:
        return
    stages = {
        "Nothing trained: perplexity": lambda record: record,
        "Nothing trained, projections re-fitted: perplexity": lambda record: record["refitted"],
    }
    for title, stage in stages.items():
        rows = []
        for method in plan.methods:
            mine = [r for r in records if r["label"] == method and "mean" in r]
            if not mine:
                continue
            cells = [[stage(r)["mean"] for r in mine if r["target"] == t] for t in plan.targets]
            seconds = [stage(r)["seconds"] for r in mine]
            rows.append([method, *map(spread, cells), f"{statistics.fmean(seconds):.0f}"])
        columns = ["method", *(f"{target:.0%}" for target in plan.targets), "seconds"]
        output.table(title, columns, rows)
    print_refused(records, output)


def print_trained(
    title: str, records: Sequence[dict[str, Any]], dense: dict[str, Any], output: Output
) -> None:
    """Print a row per method, target and number of steps, seeds summed up."""
    if not records:
        return
    groups: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for record in records:
        if "mean" in record:
            key = (record["label"], record["target"], record["steps"])
            groups.setdefault(key, []).append(record)
    sources = list(dense["perplexity"])
    rows = []
    for (label, target, steps), cells in sorted(groups.items(), key=lambda x: x[0][1:]):
        each = [spread([c["perplexity"][s] for c in cells]) for s in sources]
        means = [c["mean"] for c in cells]
        ratio = f"{statistics.fmean(means) / dense['mean']:.3f}"
        seconds = f"{statistics.fmean(c['seconds'] for c in cells):.0f}"
        rows.append([label, f"{target:.0%}", str(steps), *each, spread(means), ratio, seconds])
    columns = ["run", "target", "steps", *sources, "mean", "× dense", "seconds"]
    output.table(f"{title}: perplexity", columns, rows)
    print_refused(records, output)


def print_refused(records: Sequence[dict[str, Any]], output: Output) -> None:
    """Say which cells could not be run, and why."""
    for record in records:
        if "refused" in record:
            output.line(f"{record['label']} at {record['target']:.0%}: {record['refused']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="demo", help="hub id, checkpoint folder, or demo")
    parser.add_argument("--data", default="demo", help="text, as `nuteprune prune --data` takes it")
    parser.add_argument("--out", type=Path, help="folder of the table")
    parser.add_argument("--quick", action="store_true", help="a small table")
    parser.add_argument("--only", choices=PARTS, help="one part of the table")
    parser.add_argument("--show", action="store_true", help="what has been run; run nothing")
    parser.add_argument("--length", type=int, default=256, help="tokens per block")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    options = parser.parse_args(arguments)
    quiet_libraries()
    output = Output(options.json)
    name = "quality-quick" if options.quick else "quality"
    out = options.out or Path(__file__).parent / "results" / name
    try:
        setting = Setting(
            options.model,
            options.data,
            options.length,
            QUICK_EVAL_BLOCKS if options.quick else Setting.eval_blocks,
            pick_device(options.device),
            options.dtype,
            {
                **(QUICK_SETTINGS if options.quick else {}),
                **read_given(None, options.set, [NutePruneConfig]),
            },
        )
        bench = Bench(setting, out, output.line)
        plan = QUICK if options.quick else Plan()
        parts = [options.only] if options.only else PARTS
        table = run(plan, bench, output, parts, options.show)
    except UserError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    output.result({"out": str(out), **table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
