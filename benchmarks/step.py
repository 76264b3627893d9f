"""What a training step costs beside a plain LoRA step: time and peak memory, in one run.

    python benchmarks/step.py --json benchmarks/results/step.json
    python benchmarks/step.py --sweep

Each kind of step (see step_rows.py) lives in a fresh process, so that its peak memory is its own.
They take turns, one step each, so that whatever else the machine does falls on all of them alike.
`--sweep` goes on to other lengths, batch sizes and vocabularies, one of them at a time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from step_rows import ROWS, Cell

SWEEP_ROWS = ("lora", "nuteprune", "two_pass")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print tables, and return what `--json` writes."""
    args = parse(arguments)
    from nuteprune.jobs.sources import locate, pick_device, pick_dtype

    device = pick_device(args.device)
    cell = Cell(
        model=locate(args.model),
        batch_size=args.batch_size,
        length=args.length,
        vocabulary=args.vocabulary,
        rank=args.rank,
        dtype=str(pick_dtype(args.dtype, args.device)).removeprefix("torch."),
        device=device,
        checkpointing=args.checkpointing,
        sparsity=args.sparsity,
        autocast=args.autocast,
    )
    result = measure(cell, args.rows, args.repeats)
    result |= {"settings": asdict(cell) | {"model": args.model, "repeats": args.repeats}}
    result |= {"machine": machine(device)}
    if args.sweep:
        result["sweep"] = [
            {"cell": changed, **measure(other, SWEEP_ROWS, args.sweep_repeats, changed)}
            for changed, other in cells(cell, args)
        ]
    if args.json:
        line = json.dumps(result)
        if args.json != "-":
            Path(args.json).write_text(line + "\n", encoding="utf-8")
        print(line)
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="checkpoint folder, hub id, or 'demo'")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--vocabulary", type=int, help="random weights with so many tokens")
    parser.add_argument("--rank", type=int, default=32, help="LoRA rank of all kinds")
    parser.add_argument("--sparsity", type=float, default=0.2, help="of the student")
    parser.add_argument(
        "--autocast",
        action="store_true",
        help="adapters of all kinds compute in the base weights' dtype, not ours alone",
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each kind")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", dest="checkpointing", help="in all kinds"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="kinds of step")
    parser.add_argument("--sweep", action="store_true", help="other sizes too, beside the headline")
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[49152, 128256])
    parser.add_argument("--sweep-repeats", type=int, default=3)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="end with one JSON line; FILE gets it"
    )
    return parser.parse_args(arguments)


def cells(cell: Cell, args: argparse.Namespace) -> Iterator[tuple[str, Cell]]:
    """Yield the sweep's cells: the headline's with one size changed."""
    for name in ("length", "batch_size", "vocabulary"):
        values = args.vocabularies if name == "vocabulary" else vars(args)[f"{name}s"]
        for value in values:
            yield f"{name} {value}", replace(cell, **{name: value})


def measure(cell: Cell, rows: Sequence[str], repeats: int, title: str = "") -> dict[str, Any]:
    """Let kinds of step take turns, and print their table.

    Returns:
        Seconds of each timed step, peak bytes and tokens per second of each kind, and ratios.
    """
    answers = take_turns(cell, rows, repeats)
    seconds = {row: [answer["seconds"] for answer in told[1:]] for row, told in answers.items()}
    median = {row: statistics.median(values) for row, values in seconds.items()}
    memory = {row: told[-1]["memory_bytes"] for row, told in answers.items()}
    speed = {row: cell.batch_size * cell.length / value for row, value in median.items()}
    print(f"{title:12}{'s/step':>8}{'spread':>14}{'tokens/s':>10}{'peak GB':>9}", end="")
    print(f"{'x lora: time':>14}{'memory':>8}")
    for row in rows:
        spread = f"{min(seconds[row]):.2f}-{max(seconds[row]):.2f}"
        print(f"{row:12}{median[row]:8.2f}{spread:>14}{speed[row]:10.0f}", end="")
        print(f"{memory[row] / 1e9:9.2f}", end="")
        if "lora" in rows:
            ratios = (figures[row] / figures["lora"] for figures in (median, memory))
            print("{:14.2f}{:8.2f}".format(*ratios), end="")
        print(flush=True)
    return {
        **ratios_of(median, memory),
        "seconds": seconds,
        "memory_bytes": memory,
        "tokens_per_second": speed,
        "first_loss": {row: told[0]["loss"] for row, told in answers.items()},
        "trained_parameters": {row: told[0]["trained"] for row, told in answers.items()},
    }


def ratios_of(seconds: dict[str, float], memory: dict[str, int]) -> dict[str, float]:
    """Return the ratios that are asked for, as far as their rows were measured."""
    pairs = [("nuteprune", other) for other in ("lora", "two_pass", "two_model")]
    found = {}
    for ours, other in (*pairs, ("teachers", "ramp")):
        if ours in seconds and other in seconds:
            name = "teachers" if ours == "teachers" else f"to_{other}"
            found[f"ratio_time_{name}"] = seconds[ours] / seconds[other]
            found[f"ratio_memory_{name}"] = memory[ours] / memory[other]
    return found


def take_turns(cell: Cell, rows: Sequence[str], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Return what each row's process told of its steps; the first of them warms up."""
    script = str(Path(__file__).with_name("step_rows.py"))
    pipes: dict[str, Any] = {
        row: subprocess.Popen(
            [sys.executable, script, row, json.dumps(asdict(cell))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for row in rows
    }
    told: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    try:
        for _ in range(repeats + 1):
            for row, pipe in pipes.items():
                pipe.stdin.write("step\n")
                pipe.stdin.flush()
                line = pipe.stdout.readline()
                if not line:
                    sys.exit(f"step.py: {row} ended with exit code {pipe.wait()}")
                told[row].append(json.loads(line))
    finally:
        for pipe in pipes.values():
            pipe.stdin.close()
            pipe.stdout.close()
            pipe.wait()
    return told


def machine(device: str) -> dict[str, Any]:
    """Return what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    return {
        "threads": torch.get_num_threads(),
        "processor": cpu if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
