"""One process beside several, replicated and sharded: the same result, and what it takes.

    python benchmarks/processes.py OUT --other-text FOLDER
    python benchmarks/processes.py OUT --show

Each row is a run of the command itself, under torchrun where it has several processes (gloo, one
thread each), and a file in OUT: a table that was stopped goes on. All rows read the same text, and
their batches together have as many blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from nuteprune.files import to_json
from nuteprune.run_folder import RUN, STATE

RESULTS = Path(__file__).parent / "results" / "processes.json"
WAYS = {"one": (1, False)} | {
    f"{count} {'sharded' if sharded else 'replicated'}": (count, sharded)
    for sharded in (False, True)
    for count in (2, 4)
}
"""Name of a row -> processes, and whether they share the weights out."""
BATCH = 4
TOKENS = 32768
"""Of the model's own text, written once."""


def pruned(way: str, target: float, dtype: str, steps: int, out: Path, own: Path) -> None:
    """Prune the demo's model in one of the ways, or go on with a run in `out`."""
    count, sharded = WAYS[way]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    settings = {"calibration_blocks": 16, "adam_epsilon": 1e-2, "eval_blocks": 1}
    if sharded:
        settings["sharded"] = True
    arguments = ["--sparsity", str(target), "--dtype", dtype, "--steps", str(steps)]
    arguments += ["--batch-size", str(BATCH // count), "--own-text", str(own), "--device", "cpu"]
    arguments += ["--data", "demo", "--out", str(out), *["--resume"] * (out / RUN).exists()]
    arguments += [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    command = [sys.executable, *(launcher if count > 1 else []), "-m", "nuteprune.cli"]
    subprocess.run([*command, "prune", "demo", *arguments], env=one_thread(), check=True)


def one_thread() -> dict[str, str]:
    """Return an environment in which a process has one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def other_units(out: Path, one: Path) -> int:
    """Return how many units stay that one process cuts."""
    ours, theirs = (load_file(x / RUN / "choose.safetensors") for x in (out, one))
    return sum(int(((x > 0) & (theirs[kind] == 0)).sum()) for kind, x in ours.items())


def distance(out: Path, one: Path, name: str, start: str = "") -> float:
    """Return the largest distance of a tensor from one process's, in norms of that.

    Args:
        out: a result.
        one: that of one process.
        name: the file of both.
        start: of the names of tensors to compare.
    """
    ours, theirs = (
        {k: x.float() for k, x in load_file(folder / name).items() if k.startswith(start)}
        for folder in (out, one)
    )
    if {k: x.shape for k, x in ours.items()} != {k: x.shape for k, x in theirs.items()}:
        return float("inf")
    return max(float((ours[k] - x).norm() / x.norm().clamp(min=1e-30)) for k, x in theirs.items())


def judged(out: Path, other_text: Path) -> float:
    """Return the mean perplexity on other text."""
    import torch
    from quality_text import Judge, Setting

    from nuteprune import load_pruned
    from nuteprune.jobs.sources import load_tokenizer
    from nuteprune.judge.perplexity import mean

    setting = Setting(dtype="bfloat16", eval_blocks=1)
    specs, _ = setting.mixture()
    judge = Judge(setting, load_tokenizer("demo"), specs, other_text)
    return mean(judge.figures(load_pruned(out, dtype=torch.bfloat16))["other"])


def name_of(way: str, target: float, dtype: str, steps: int) -> str:
    """Return the name of a row's files."""
    return f"{way.replace(' ', '-')}_{target:g}_{dtype}_{steps}-steps"


def row(name: str, way: str, target: float, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what is found of a run, beside that of one process."""
    folder = Path(args.out)
    out, one = (folder / x for x in (name, name_of("one", target, dtype, args.steps)))
    pruned(way, target, dtype, args.steps, out, folder / "own.jsonl")
    records = [json.loads((x / "nuteprune.json").read_text()) for x in (out, one)]
    return {
        "way": way,
        "target": target,
        "dtype": dtype,
        "steps": args.steps,
        "other_units": other_units(out, one),
        "refitted": distance(out, one, "run/refit.safetensors"),
        "learned": distance(out, one, f"run/checkpoint-{args.steps}/{STATE}", "lora/"),
        "stored": distance(out, one, "model.safetensors"),
        "other": judged(out, Path(args.other_text)),
        "stages": records[0]["stages"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown."""
    stages = ("score", "refit", "teach", "judge")
    heads = ["removed", "computed in", "processes", "other units"]
    heads += ["refitted", "learned", "stored", "other text"]
    lines = ["| " + " | ".join([*heads, *stages]) + " |"]
    lines.append("|---" * (len(heads) + len(stages)) + "|")
    ones = {(x["target"], x["dtype"], x["steps"]): x for x in rows if x["way"] == "one"}
    for x in rows:
        one = ones[x["target"], x["dtype"], x["steps"]]
        cells = [f"{x['target']:.0%}", x["dtype"], x["way"], str(x["other_units"])]
        cells += [
            "" if x.get(k) is None else f"{x[k]:.0e}" for k in ("refitted", "learned", "stored")
        ]
        cells += [f"{100 * (x['other'] / one['other'] - 1):+.1f} %"]
        cells += [
            f"{x['stages'][s]['cpu_seconds']:.0f}" if s in x["stages"] else "" for s in stages
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Make the rows that are missing, and show all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--other-text")
    parser.add_argument("--targets", default="0.2,0.5")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / "own.jsonl"
    if not (args.show or own.exists()):
        command = [sys.executable, "-m", "nuteprune.cli", "write", "demo"]
        command += ["--tokens", str(TOKENS), "--dtype", "bfloat16", "--out", str(own)]
        subprocess.run(command, env=one_thread(), check=True)
    for dtype in () if args.show else args.dtypes.split(","):
        for target in map(float, args.targets.split(",")):
            for way in WAYS:
                name = name_of(way, target, dtype, args.steps)
                if not (folder / f"{name}.json").exists():
                    found = row(name, way, target, dtype, args)
                    (folder / f"{name}.json").write_text(to_json(found))
    rows = [json.loads(path.read_text()) for path in folder.glob("*-steps.json")]
    rows.sort(key=lambda x: (x["steps"], x["dtype"], x["target"], list(WAYS).index(x["way"])))
    RESULTS.write_text(to_json(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
