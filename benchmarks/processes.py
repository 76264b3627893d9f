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
    """Prune the demo's model in one of the ways."""
    count, sharded = WAYS[way]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    settings = {"calibration_blocks": 16, "adam_epsilon": 1e-2, "eval_blocks": 1}
    if sharded:
        settings["sharded"] = True
    arguments = ["--sparsity", str(target), "--dtype", dtype, "--steps", str(steps)]
    arguments += ["--batch-size", str(BATCH // count), "--own-text", str(own), "--device", "cpu"]
    arguments += ["--data", "demo", "--out", str(out), "--overwrite"]
    arguments += [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    command = [sys.executable, *(launcher if count > 1 else []), "-m", "nuteprune.cli"]
    subprocess.run([*command, "prune", "demo", *arguments], env=one_thread(), check=True)


def one_thread() -> dict[str, str]:
    """Return an environment in which a process has one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def distance(out: Path, one: Path, name: str) -> float:
    """Return the largest distance of a tensor from one process's, in norms of that."""
    ours, theirs = load_file(out / name), load_file(one / name)
    if [(k, v.shape) for k, v in ours.items()] != [(k, v.shape) for k, v in theirs.items()]:
        return float("inf")
    pairs = ((ours[k].float(), theirs[k].float()) for k in theirs)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


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


def row(way: str, target: float, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what is found of a run, beside that of one process."""
    folder = Path(args.out)
    names = (f"{x}_{target:g}_{dtype}_{args.steps}-steps" for x in (way, "one"))
    out, one = (folder / name.replace(" ", "-") for name in names)
    pruned(way, target, dtype, args.steps, out, folder / "own.jsonl")
    records = [json.loads((x / "nuteprune.json").read_text()) for x in (out, one)]
    return {
        "way": way,
        "target": target,
        "dtype": dtype,
        "steps": args.steps,
        "same_units": records[0]["layers"] == records[1]["layers"],
        "refitted": distance(out, one, "run/refit.safetensors"),
        "taught": distance(out, one, "model.safetensors"),
        "other": judged(out, Path(args.other_text)),
        "stages": records[0]["stages"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown."""
    stages = ("score", "refit", "teach", "judge")
    heads = ["removed", "computed in", "processes", "units", "refitted", "taught", "other text"]
    lines = ["| " + " | ".join([*heads, *stages]) + " |"]
    lines.append("|---" * (len(heads) + len(stages)) + "|")
    ones = {(x["target"], x["dtype"], x["steps"]): x for x in rows if x["way"] == "one"}
    for x in rows:
        one = ones[x["target"], x["dtype"], x["steps"]]
        cells = [f"{x['target']:.0%}", x["dtype"], x["way"]]
        cells += ["the same" if x["same_units"] else "others"]
        cells += [f"{x[name]:.0e}" for name in ("refitted", "taught")]
        cells += [f"{100 * (x['other'] / one['other'] - 1):+.1f} %"]
        cells += [f"{x['stages'][s]['cpu_seconds']:.0f}" for s in stages]
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
                name = f"{way.replace(' ', '-')}_{target:g}_{dtype}_{args.steps}-steps.json"
                if not (folder / name).exists():
                    (folder / name).write_text(to_json(row(way, target, dtype, args)))
    rows = [json.loads(path.read_text()) for path in folder.glob("*-steps.json")]
    rows.sort(key=lambda x: (x["steps"], x["dtype"], x["target"], list(WAYS).index(x["way"])))
    RESULTS.write_text(to_json(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
