"""The quality table: pruned models side by side, by in-domain text, other text and copying.

    python benchmarks/quality.py                    # the whole table: some ten hours on two cores
    python benchmarks/quality.py --quick            # a small one: a quarter of an hour, reckoned
    python benchmarks/quality.py --only ablation    # one part: untrained, trained or ablation
    python benchmarks/quality.py --show             # what has been run so far; runs nothing
    python benchmarks/quality.py --leave-out recipes        # judged by a source not trained on
    python benchmarks/quality.py --other-text FOLDER        # and by jsonl files, a domain each

With `--choose` models are judged by the 1st, 3rd, ... lines of other text, otherwise by the 2nd,
4th, ...: what was chosen by is not what accepts. `--leave-out` calibrates and trains on the two
other embedded sources, which DATA specs name as `demo:wikipedia,speeches`; its third source judges
by its held-out stretches, odd or even alike.

Each run is a JSON file written as it ends, and a started table goes on where it stopped. Runs use
the package's own methods, so all share text, units, budget, refit and distillation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from quality_plots import draw
from quality_runs import SETTING, Bench, Cell, write_json
from quality_tables import markdown, print_dense, print_part
from quality_text import Setting, files_of, rated

from nuteprune import UserError
from nuteprune.cli.app import quiet_libraries
from nuteprune.console import Output
from nuteprune.data.demo import TEXTS
from nuteprune.data.specs import DEMO
from nuteprune.files import file_sum
from nuteprune.gates import METHOD
from nuteprune.gates.importance import METHODS
from nuteprune.jobs.read_settings import read_assignments, read_given
from nuteprune.jobs.sources import pick_device
from nuteprune.train.config import NutePruneConfig

OURS = "nuteprune"
BLOCKS = "attn_block,mlp_block"
ABLATION: dict[str, dict[str, Any]] = {
    "no distillation": {"teacher": "none"},
    "half ramp, numerous teachers": {"progressive": True},
    "hard-concrete gates": {"progressive": True, "gate_type": "hard_concrete"},
    "rank 128": {"lora_rank": 128},
    "no refit": {"refit": False},
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

    methods: Sequence[str] = tuple(x for x in METHODS if METHODS[x].kinds != ("experts",))
    targets: Sequence[float] = (0.1, 0.2, 0.25, 0.5)
    seeds: Sequence[int] = (0, 1, 2)
    trained: Sequence[str] = (OURS, "fisher", "taylor", "random")
    trained_once: Sequence[str] = ("wanda", "flap", "similarity")
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
        show: leave out what is missing instead of running it, and write nothing.

    Returns:
        What `table.json` holds.

    Raises:
        UserError: if there is nothing to show.
    """
    if show and not bench.begun:
        raise UserError(f"nothing has been run in {bench.folder} yet")

    asked: set[str] = set()

    def records_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
        asked.update(cell.file_name for cell in cells)
        there = [cell for cell in cells if bench.has(cell) or not show]
        return [
            rated(bench.shown(cell.file_name) if show else bench.run(cell), dense) for cell in there
        ]

    dense = bench.dense()
    print_dense(dense, bench.setting, output)
    records: dict[str, list[dict[str, Any]]] = {}
    if "untrained" in parts:
        records["untrained"] = records_of(plan.untrained_cells())
        print_part("untrained", records["untrained"], output)
    if "trained" in parts:
        found = records_of(plan.trained_cells())
        found += records_of(plan.long_cells(best_baseline(found, plan)))
        records["trained"] = found
        print_part("trained", found, output)
    if "ablation" in parts:
        records["ablation"] = records_of(plan.ablation_cells())
        if show and set(parts) == set(PARTS):  # rows that had another name when they were run
            others = sorted(bench.files - asked)
            records["ablation"] += [rated(bench.shown(name), dense) for name in others]
        print_part("ablation", records["ablation"], output)
    file = bench.folder / "table.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    table = {**earlier, "dense": dense, **records}
    if show:
        return table
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


def adapted(plan: Plan, options: argparse.Namespace) -> Plan:
    """Return a plan with the methods, targets, seeds and steps that are asked for."""
    given: dict[str, Any] = {}
    if options.methods:
        methods = options.methods.split(",")
        if unknown := [x for x in methods if x not in METHODS]:
            raise UserError(f"no method is called {unknown[0]}; pass some of {','.join(METHODS)}")
        trained = [OURS if x == METHOD else x for x in methods]
        given |= {"methods": methods, "trained": trained, "trained_once": ()}
    try:
        if options.targets:
            targets = [float(x) for x in options.targets.split(",")]
            given |= {"targets": targets, "trained_targets": targets}
        if options.seeds:
            given["seeds"] = [int(x) for x in options.seeds.split(",")]
    except ValueError as error:
        raise UserError(f"{error}: write numbers, separated by commas") from error
    if options.steps is not None:
        given |= {"steps": options.steps, "long_steps": 0}
    return replace(plan, **given)


def setting_of(options: argparse.Namespace) -> Setting:
    """Return what all cells of the table that is asked for share."""
    settings = read_given({}, read_assignments(options.set), [NutePruneConfig])
    data = options.data or [DEMO]
    try:
        shares = [float(x) for x in options.shares.split(",")] if options.shares else None
    except ValueError as error:
        raise UserError(f"{error}: write shares as numbers, such as 0.7,0.3") from error
    files = files_of(options.other_text) if options.other_text else []
    return Setting(
        options.model,
        data,
        options.length,
        QUICK_EVAL_BLOCKS if options.quick else Setting.eval_blocks,
        pick_device(options.device),
        options.dtype,
        {**(QUICK_SETTINGS if options.quick else {}), **settings},
        shares,
        {file.stem: file_sum(file)[:16] for file in files},
        options.leave_out,
        options.choose,
    )


def parser_of() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default=DEMO, help="hub id, checkpoint folder, or demo")
    add("--data", action="append", help="text, as `nuteprune prune --data` takes it")
    add("--shares", help="of the tokens, for each --data, comma separated")
    add("--other-text", type=Path, metavar="FOLDER", help="jsonl files to judge by, a domain each")
    add("--leave-out", choices=list(TEXTS), help="train on the other embedded sources, judge this")
    add("--choose", action="store_true", help="judge by odd lines: figures to choose settings by")
    add("--out", type=Path, help="folder of the table")
    add("--quick", action="store_true", help="a small table")
    add("--only", choices=PARTS, help="one part of the table")
    add("--methods", help="these alone, comma separated")
    add("--targets", help="these alone, such as 0.2,0.5")
    add("--seeds", help="these alone, such as 0,1")
    add("--steps", type=int, help="of the trained part and the ablation; no longer runs")
    add("--show", action="store_true", help="what has been run; run nothing")
    add("--markdown", action="store_true", help="end with the rows as a page shows them")
    add("--length", type=int, default=256, help="tokens per block")
    add("--device", default="auto")
    add("--dtype", default="bfloat16")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs")
    add("--json", action="store_true", help="end with one JSON line")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = parser_of().parse_args(arguments)
    quiet_libraries()
    output = Output(options.json)
    name = "quality-quick" if options.quick else "quality"
    out = options.out or Path(__file__).parent / "results" / name
    begun = options.show and (out / SETTING).exists()
    try:
        setting = Setting.read(out / SETTING) if begun else setting_of(options)
        plan = adapted(QUICK if options.quick else Plan(), options)
        bench = Bench(setting, out, output.line, options.other_text)
        parts = [options.only] if options.only else PARTS
        table = run(plan, bench, output, parts, options.show)
    except UserError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        output.line(markdown(table, parts))
    output.result({"out": str(out), **table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
