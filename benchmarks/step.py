"""What a training step costs beside a plain LoRA step: time and peak memory, in one run.

    python benchmarks/step.py --json benchmarks/results/step.json

Each kind of step lives in a process of its own, so that its peak memory is its own. They take
turns, one step each, so that whatever else the machine does falls on all of them alike.

- lora: PEFT's LoRA on all projections, the model's own language-model loss; the yardstick.
- two_pass: distillation as it is usually written: a teacher pass with the adapters off, a student
  pass, KL of the full logits.
- nuteprune: a step of `NutePruneTrainer`: masks on heads and neurons, both roles layer by layer in
  one pass, KL chunk by chunk, scores of all units re-estimated from the gradients.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

KINDS = ("lora", "two_pass", "nuteprune")


def main() -> None:
    """Parse the command line; run the measurement, or one kind of step as its child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="checkpoint folder, hub id, or 'demo'")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--rank", type=int, default=32, help="LoRA rank of all kinds")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each kind")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(make_step(args.child, args))
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Let the kinds take turns; print a table and, as the last line, JSON."""
    command = [sys.executable, *sys.argv]
    pipes: dict[str, Any] = {
        kind: subprocess.Popen(
            [*command, "--child", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for kind in KINDS
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    answer: dict[str, Any] = {}
    for turn in range(args.repeats + 1):
        for kind, pipe in pipes.items():
            pipe.stdin.write("step\n")
            pipe.stdin.flush()
            answer[kind] = json.loads(pipe.stdout.readline())
            if turn:  # the first one warms up
                seconds[kind].append(answer[kind]["seconds"])
    for pipe in pipes.values():
        pipe.stdin.close()
        pipe.wait()
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    memory = {kind: answer[kind]["memory_bytes"] for kind in KINDS}
    print(f"{'':12}{'s/step':>8}{'spread':>16}{'x LoRA':>8}{'peak GB':>9}{'x LoRA':>8}")
    for kind in KINDS:
        spread = f"{min(seconds[kind]):.2f}-{max(seconds[kind]):.2f}"
        print(
            f"{kind:12}{median[kind]:8.2f}{spread:>16}{median[kind] / median['lora']:8.2f}"
            f"{memory[kind] / 1e9:9.2f}{memory[kind] / memory['lora']:8.2f}"
        )
    result = {
        "ratio_time_to_lora": median["nuteprune"] / median["lora"],
        "ratio_memory_to_lora": memory["nuteprune"] / memory["lora"],
        "seconds": seconds,
        "memory_bytes": memory,
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "child")},
        "machine": {
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        },
    }
    line = json.dumps(result)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


def serve(step: Callable[[], None]) -> None:
    """Do a step for each line that comes in, and tell its seconds and the peak memory so far."""
    from nuteprune.export.record import peak_memory

    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "memory_bytes": peak_memory()}), flush=True)


def make_step(kind: str, args: argparse.Namespace) -> Callable[[], None]:
    """Return a function that does one optimizer step of a kind, always on the same tokens."""
    from nuteprune import NutePruneConfig, NutePruneTrainer
    from nuteprune.cli.sources import load_model, pick_device, pick_dtype
    from nuteprune.train.data import BlockDataset

    device = pick_device(args.device)
    model = load_model(args.model, pick_dtype(args.dtype, args.device)).to(device)
    random = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(0, vocabulary, (args.batch_size, args.length), generator=random)
    trainer = NutePruneTrainer(
        model,
        NutePruneConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=device == "cpu",
            lora_rank=args.rank,
            lora_alpha=args.rank,
            per_device_train_batch_size=args.batch_size,
            gradient_checkpointing=args.gradient_checkpointing,
        ),
        BlockDataset(ids_BT),
    )
    optimizer = trainer.create_optimizer()
    ids_BT = ids_BT.to(device)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}

    def lora() -> None:
        trainer.model(**inputs, labels=ids_BT, use_cache=False).loss.backward()

    def two_pass() -> None:
        with torch.no_grad(), trainer.model.disable_adapter():
            theirs_BTV = trainer.model(**inputs, use_cache=False).logits.log_softmax(-1)
        ours_BTV = trainer.model(**inputs, use_cache=False).logits.log_softmax(-1)
        (theirs_BTV.exp() * (theirs_BTV - ours_BTV)).sum(-1).mean().backward()

    def nuteprune() -> None:
        trainer.trial_step(inputs)
        trainer.gates.observe()

    backward = {"lora": lora, "two_pass": two_pass, "nuteprune": nuteprune}[kind]

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    trainer.model.train()
    return step


if __name__ == "__main__":
    main()
