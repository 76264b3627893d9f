"""A speedup by what blocks cost in seconds, and the same measured speed by parameters.

    python benchmarks/speedup.py --other-text FOLDER --json benchmarks/results/speedup.json
    python benchmarks/speedup.py --show benchmarks/results/speedup.json   # the table; runs nothing

Both allocate by the same scores, among the same units, whole blocks too; nothing is trained, all is
refitted. What is removed by parameters grows until both decode as fast: first by the table of
costs, then until turns of both measure no difference. Other text is the odd lines of FOLDER's jsonl
files. A quarter of an hour on one core. What is there already is kept in --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from quality_runs import Bench, Cell, machine, results, write_json
from quality_text import Setting, files_of, times_dense

from nuteprune.console import Output
from nuteprune.data.specs import DEMO
from nuteprune.export.checkpoint import save
from nuteprune.export.config import pruned_config
from nuteprune.export.loading import unfilled
from nuteprune.files import file_sum
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.costs import Goal, Seconds, seconds_of
from nuteprune.jobs.read_settings import read_assignments, read_given
from nuteprune.jobs.speed import write_table
from nuteprune.jobs.timing import Computing, conditions, measure
from nuteprune.judge import bench as speed
from nuteprune.judge import work as timed
from nuteprune.model.family import BLOCK_KINDS
from nuteprune.model.shape import Shape
from nuteprune.products import Products
from nuteprune.train.asked import moment
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.constraints import DEFAULT_KINDS
from nuteprune.train.targets import read_table

EVAL_BLOCKS = 8
TRIES = 3
"""So often parameters are removed anew where speeds are measured to differ."""
HALVINGS = 12


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is not there yet, print the table, and return the results."""
    return results(parser_of().parse_args(arguments), run, table)


def parser_of() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEMO, help="hub id, checkpoint folder, or demo")
    add("--data", action="append", help="text, as `nuteprune prune --data` takes it")
    add("--other-text", type=Path, metavar="FOLDER", help="jsonl files to judge by, a domain each")
    add("--speedups", default="1.3,1.6", help="of decoding, comma separated")
    add("--at", default="1x256+32", help="what is timed, as --speedup says it after @")
    add("--passes", type=int, default=speed.PASSES, help="counted passes of each pair")
    add("--length", type=int, default=256, help="tokens of a block")
    add("--eval-blocks", type=int, default=EVAL_BLOCKS, help="blocks of each text")
    add("--threads", type=int, default=1)
    add("--dtype", default="bfloat16")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method")
    add("--out", type=Path, default=Path("speedup"), help="folder of what is kept on the way")
    add("--json", type=Path, help="file of results")
    add("--show", type=Path, help="print the table of such a file")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return the results, from what earlier calls have left where it is there."""
    torch.set_num_threads(args.threads)
    settings = read_given({}, read_assignments(args.set), [NutePruneConfig])
    files = files_of(args.other_text) if args.other_text else []
    setting = Setting(
        args.model,
        args.data or [DEMO],
        length=args.length,
        eval_blocks=args.eval_blocks,
        dtype=args.dtype,
        settings={**settings, "gates": ",".join((*DEFAULT_KINDS, *BLOCK_KINDS))},
        other_text={file.stem: file_sum(file)[:16] for file in files},
        choose=True,
    )
    bench = Bench(setting, args.out, print, args.other_text)
    bench.judge.other = {name: x[: args.eval_blocks] for name, x in bench.judge.other.items()}
    found = Comparison(args, bench)
    dense = found.bench.dense()
    rows = [row for x in args.speedups.split(",") for row in found.rows(float(x))]
    for row in rows:
        row["times_dense"] = times_dense(row, dense)
    about = {"at": args.at, "passes": args.passes, "dtype": args.dtype, **setting.settings}
    return {"about": about, "costs": found.costs, "dense": dense, "rows": rows}


class Comparison:
    """Models of two allocations, timed and judged.

    Args:
        args: the command line's.
        bench: scores, refits and judges; its folder has what is kept.
    """

    def __init__(self, args: argparse.Namespace, bench: Bench) -> None:
        self.args, self.bench = args, bench
        self.at = timed.Workload(*moment(args.at))
        self.how = Computing.asked("cpu", args.dtype, args.threads)
        self.costs = self._costs()
        cell = Cell("speedup", {}, 0.2, 0, seed=0)
        self.cut = bench.cut(cell, bench.folder / "stages", keeps=True)
        self.allocator = self.cut.model.allocator
        self.seconds = seconds_of(self.costs, self.allocator.budget, "decode")
        self.scores = self.cut.score()
        self.cut.products = Products(None, {})  # what comes is of several shapes

    def _costs(self) -> dict[str, Any]:
        path = self.bench.folder / "costs.json"
        if path.exists():
            return read_table(str(path))
        return write_table(path, self.bench.model(), self.at, self.how)

    def rows(self, asked: float) -> list[dict[str, Any]]:
        """Return the rows of a speedup: by seconds, and by parameters."""
        path = self.bench.folder / f"speedup-{asked:g}.json"
        if not path.exists():
            write_json(path, {"rows": self._made(asked)})
        made: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return made

    def _made(self, asked: float) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            shapes = {"seconds": by_seconds(self.allocator, self.scores, self.seconds, asked)}
            self._write(shapes["seconds"], folder / "seconds")
            expected = self.seconds_gained(shapes["seconds"])
            for attempt in range(TRIES):
                shape = by_parameters(self.allocator, self.scores, self.seconds, expected)
                self._write(shape, folder / f"parameters-{attempt}")
                pair = [str(folder / x) for x in (f"parameters-{attempt}", "seconds")]
                beside = self._timed(pair)
                ratio = beside["decode"]
                print(f"{asked:g}: by parameters {spread(ratio)} as fast as by seconds", flush=True)
                if ratio["low"] <= 1 <= ratio["high"]:
                    break
                expected /= ratio["median"]
            shapes["parameters"] = shape
            timed = dict(zip(("parameters", "seconds"), pair, strict=True))
            return [
                {
                    **{"asked": asked, "by": by, "beside_seconds": beside["decode"]},
                    **self._told(shapes[by]),
                    "speedup": self._timed([timed[by], self.args.model]),
                    **self._judged(shapes[by]),
                    "machine": machine(),
                }
                for by in ("seconds", "parameters")
            ]

    def seconds_gained(self, shape: Shape) -> float:
        """Return how many times as fast a model of a shape is by the table."""
        return self.seconds.total(self.allocator.budget.shape) / self.seconds.total(shape)

    def _write(self, shape: Shape, folder: Path) -> None:
        """Write a model of a shape, to be timed: its weights are of no meaning."""
        dense = self.cut.model.anatomy
        model = unfilled(pruned_config(dense.config, dense.family, shape))
        save(model.to(self.how.dtype), folder)

    def _timed(self, names: list[str]) -> dict[str, Any]:
        """Return the first one's times beside the second's, in turns as `bench` does it."""
        with Output(quiet=True).bars() as bars:
            found = measure(names, [self.at], self.args.passes, self.how, bars)
        ratios: dict[str, Any] = found["settings"][0]["speedup"]
        return {**ratios, "conditions": conditions(found)}

    def _told(self, shape: Shape) -> dict[str, Any]:
        budget = self.allocator.budget
        layers = shape.layers
        return {
            "sparsity": budget.sparsity(shape),
            "attention_blocks": sum(x.attention for x in layers),
            "mlp_blocks": sum(x.mlp for x in layers),
            "kv_heads": sum(x.kv_heads for x in layers),
            "neurons": sum(x.neurons for x in layers),
            "expected": self.seconds_gained(shape),
        }

    def _judged(self, shape: Shape) -> dict[str, Any]:
        """Return the figures of a shape's model, which take the longest: kept as soon as known."""
        name = hashlib.sha256(repr(shape).encode()).hexdigest()[:16]
        path = self.bench.folder / f"judged-{name}.json"
        if not path.exists():
            masks = self.allocator.masks(shape, self.scores).to(self.cut.model.device)
            weights = self.cut.refit(masks, self.cut.model.targets[-1])
            write_json(path, self.bench.judged(self.cut, masks, weights))
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return figures


def by_seconds(
    allocator: Allocator, scores: dict[str, torch.Tensor], seconds: Seconds, asked: float
) -> Shape:
    """Return the shape of least loss that is so many times as fast by the table."""
    whole = seconds.total(allocator.budget.shape)
    goal = Goal(
        seconds,
        whole / asked,
        f"speedup {asked:g}",
        lambda least: f"make it at most {whole / least:.2f} x as fast",
        "ask for less",
    )
    return allocator.shape(scores, goal)


def by_parameters(
    allocator: Allocator, scores: dict[str, torch.Tensor], seconds: Seconds, asked: float
) -> Shape:
    """Return the shape of least loss at the sparsity that is so many times as fast by the table."""
    whole = seconds.total(allocator.budget.shape)
    low, high = 0.0, allocator.maximum()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if whole / seconds.total(allocator.shape(scores, middle)) < asked:
            low = middle
        else:
            high = middle
    return allocator.shape(scores, high)


COLUMNS = (
    *("asked", "allocated by", "sparsity", "attention blocks", "MLPs", "KV heads", "neurons"),
    *("decode, by the table", "decode, measured", "prefill, measured"),
    *("other text", "in-domain", "copying"),
)


def table(result: dict[str, Any]) -> str:
    """Return the rows as a page shows them."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in result["rows"]:
        ratios = row["times_dense"]
        other = "-" if ratios["other_mean"] is None else f"{ratios['other_mean']:.2f} x"
        copied = "-" if row["copying"] is None else f"{row['copying']:.0f} %"
        counts = (row[x] for x in ("attention_blocks", "mlp_blocks", "kv_heads", "neurons"))
        cells = [
            *(f"{row['asked']:g} x", row["by"], f"{row['sparsity']:.1%}", *map(str, counts)),
            *(f"{row['expected']:.2f} x", *(spread(row["speedup"][x]) for x in PHASES)),
            *(other, f"{ratios['in_domain']:.2f} x", copied),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


PHASES = ("decode", "prefill")


def spread(ratio: dict[str, Any]) -> str:
    """Return a ratio's median and range."""
    return f"{ratio['median']:.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f})"


if __name__ == "__main__":
    main()
