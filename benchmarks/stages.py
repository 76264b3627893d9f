"""Each stage of a run beside its bound: its products at this machine's rates, and what it took.

    python benchmarks/stages.py OUT/surgeon_20_12-minutes_seed-0.json --json results/stages.json

The file is a row of frontier.py made with `--cpu`: its stages' CPU seconds are those of one thread,
and so are the rates. Judging is left out: no plan has the products of answers and context.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from nuteprune.data.demo import model_folder
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.plan import config_of
from nuteprune.jobs.planned import Rate
from nuteprune.jobs.prune_run import share_to_write, trainer_config
from nuteprune.plan.phases import Phase, Plan

STAGES = ("write", "score", "refit", "teach")
TIMES = 5
PLANNED = ("target_sparsity", "max_steps", "calibration_blocks", "text_blocks")


def phases_of(row: Mapping[str, Any]) -> list[Phase]:
    """Return the phases of a row's run of the demo's model."""
    config, folder = row["config"], str(model_folder())
    settings = {name: config[name] for name in PLANNED if config.get(name) is not None}
    settings |= {"method": row["method"]}
    job = PruneJob(folder, Path("unused"), data="demo", length=config["length"], settings=settings)
    dtype = torch.bfloat16
    with tempfile.TemporaryDirectory() as scratch:
        args = trainer_config(replace(job, device="cpu"), Path(scratch))
        how: dict[str, Any] = {"own": share_to_write(job), "stored": dtype}
        plan = Plan.of(config_of(folder), args, job.length, dtype, **how)
        return [phase for phase in plan.phases() if phase.name in STAGES]


def rates() -> Rate:
    """Return the medians of some measurements of one thread."""
    found = [Rate.measured(torch.bfloat16, "cpu") for _ in range(TIMES)]
    return Rate(
        median(x.plain for x in found),
        median(x.fine for x in found),
        median(x.read or 0 for x in found),
    )


def table(row: Mapping[str, Any], rate: Rate) -> list[dict[str, Any]]:
    """Return what each stage computes, what that takes at the rates, and what it took."""
    return [
        {
            "stage": phase.name,
            "tflop": phase.need.flops / 1e12,
            "fp32": phase.need.fine / 1e12,
            "read_gb": phase.read / 1e9,
            "bound": rate.seconds(phase),
            "took": row["stages"][phase.name]["cpu_seconds"],
        }
        for phase in phases_of(row)
    ]


def main() -> None:
    """Print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    row, rate = json.loads(asked.row.read_text()), rates()
    rows = table(row, rate)
    print("| stage | TFLOP | of these in fp32 | GB read | at these rates | took | times |")
    print("|---|---|---|---|---|---|---|")
    for x in rows:
        cells = [x["stage"], *(f"{x[name]:.1f}" for name in ("tflop", "fp32", "read_gb"))]
        cells += [f"{x['bound']:.0f} s", f"{x['took']:.0f} s", f"{x['took'] / x['bound']:.1f}"]
        print(f"| {' | '.join(cells)} |")
    if asked.json:
        run = {name: row[name] for name in ("method", "target", "minutes", "seed", "config")}
        kept = {"run": run, "flops_per_second": rate.plain, "fp32_flops_per_second": rate.fine}
        kept |= {"bytes_per_second": rate.read, "stages": rows}
        asked.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
