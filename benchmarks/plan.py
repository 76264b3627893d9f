"""What a plan says that each stage of a run holds, beside what the run was measured to hold.

    python benchmarks/plan.py --json benchmarks/results/plan.json

Each run lives in a fresh process, on the CPU, and goes through its phases on random tokens.
Measured is the peak of anonymous memory above what the process had before it loaded the model, read
from Linux's /proc every few milliseconds. Weights that are mapped from their files are not
anonymous: they are taken out of the plan where a run computes in the dtype that they are stored in.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
PAUSE = 0.01
"""Seconds between two looks."""
LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 12,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
"""1.1 billion parameters, in wide layers with few neurons: what is inverted grows with the cube of
these, and would take most of a run on few cores."""
RAMP: dict[str, Any] = {"progressive": True, "ramp_share": 1.0, "teacher": "snapshots"}
SHORT: dict[str, Any] = {"calibration_blocks": 2, "lora_rank": 8}
"""Settings with which a run of it is short."""


@dataclass(frozen=True)
class Cell:
    """A run to be planned and measured.

    Args:
        name: what tables call it.
        model: `demo`, or `llama-1b`: random weights in bfloat16.
        dtype: what is computed in.
        length: tokens per block.
        settings: of the trainer, beside those that all cells have.
    """

    name: str
    model: str
    dtype: str
    length: int
    settings: dict[str, Any] = field(default_factory=dict)

    def arguments(self, out: str) -> Any:
        """Return the trainer's settings."""
        from nuteprune.train.config import prune_config

        common = {"target_sparsity": 0.3, "max_steps": 2, "calibration_blocks": 4}
        here = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
        settings = {**common, **here, **self.settings}
        return prune_config(settings)(output_dir=out, **settings)


CELLS = (
    Cell("default", "demo", "bfloat16", 256, {"per_device_train_batch_size": 4}),
    Cell(
        "checkpointing",
        "demo",
        "bfloat16",
        512,
        {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
    ),
    Cell(
        "ramp, float32",
        "demo",
        "float32",
        256,
        {"per_device_train_batch_size": 2, **RAMP, "max_steps": 4},
    ),
    Cell("default", "llama-1b", "bfloat16", 128, {"per_device_train_batch_size": 1, **SHORT}),
    Cell(
        "checkpointing",
        "llama-1b",
        "bfloat16",
        256,
        {"per_device_train_batch_size": 2, "gradient_checkpointing": True, **SHORT},
    ),
    Cell(
        "ramp",
        "llama-1b",
        "bfloat16",
        128,
        {"per_device_train_batch_size": 2, **RAMP, "max_steps": 3, **SHORT},
    ),
)


class Watch:
    """The peak of this process's anonymous memory, phase by phase, above what it is now."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._phase: str | None = None
        self._changes = 0
        give_back()  # what is free already must not hide what comes
        self._base = anonymous()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._note()
            time.sleep(PAUSE)

    def _note(self) -> None:
        changes, phase = self._changes, self._phase
        held = anonymous() - self._base
        if phase is not None and changes == self._changes:  # else another one came meanwhile
            self.peaks[phase] = max(held, self.peaks.get(phase, 0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Let what is held inside this context count as a phase's, but for phases inside it."""
        outer = self._phase
        self._change(name)
        try:
            yield
            self._note()
        finally:
            self._change(outer)

    def _change(self, phase: str | None) -> None:
        give_back()  # else what the phase before has freed would count too
        self._changes += 1
        self._phase = phase

    def around(self, module: Any, function: str, name: Callable[[], str]) -> None:
        """Make a phase of each call of a module's function."""
        inner = getattr(module, function)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name()):
                return inner(*args, **kwargs)

        setattr(module, function, watched)


class Unwatched(Watch):
    """Nobody looks, and nothing is given back for it: a run as it is."""

    def __init__(self) -> None:
        self.peaks = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Do nothing."""
        yield

    def around(self, module: Any, function: str, name: Callable[[], str]) -> None:
        """Do nothing."""


def give_back() -> None:
    """Return what this process has freed to the system."""
    from nuteprune import memory

    gc.collect()
    memory.give_back()


def anonymous() -> int:
    """Return the bytes of memory that this process has and that no file stands behind."""
    for line in STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("plan.py: /proc/self/status has no RssAnon; this needs Linux 4.5 or newer")


def measured(cell: Cell, model: str, out: str, watching: type[Watch]) -> dict[str, int]:
    """Go through a run and return its stages' peaks in bytes."""
    from nuteprune.data.training_text import BlockDataset
    from nuteprune.gates import copying_losses
    from nuteprune.jobs.sources import load_model, stored_dtype
    from nuteprune.judge.perplexity import perplexities
    from nuteprune.progressive import trainer as progressive
    from nuteprune.train import first_stages

    watch = watching()
    dense = load_model(model, getattr(torch, cell.dtype))
    random = torch.Generator().manual_seed(0)
    args = cell.arguments(out)
    vocabulary = dense.config.vocab_size
    tokens = torch.randint(3, vocabulary, (args.blocks, cell.length), generator=random)
    with watch.phase("judge"):
        perplexities(dense, {"random": tokens[:4]}, batch_size=4)
    stored, kind = stored_dtype(dense), import_module(args.PIPELINE).TRAINER
    trainer = kind(dense, args, BlockDataset(tokens), stored_dtype=stored)
    del dense
    copying_losses.copying_losses = few_losses
    for stage in ("score", "refit"):
        watch.around(first_stages, stage, lambda name=stage: name)
    watch.around(progressive, "refit", lambda: "refit")
    with watch.phase("teach"):
        trainer.train()
    with watch.phase("slice"):
        again = load_model(model, getattr(torch, cell.dtype)) if args.sharded else None
        trainer.finalize(again)
    with watch.phase("save"):
        trainer.save_pruned(Path(out) / "small")
    return watch.peaks


def few_losses(probe: Any, kind: str, dense: Any, *_: Any) -> torch.Tensor:
    """Cut some of the first layer's units alone, in place of all: each holds the same."""
    from nuteprune.gates import copying_losses

    units = torch.arange(min(copying_losses.AT_ONCE, probe.layout.sizes[kind][0]))
    copying_losses.losses_without(probe, kind, 0, units, dense)
    return torch.ones(probe.layout.units(kind))


def planned(cell: Cell, model: str) -> dict[str, int]:
    """Return what the plan says of the same."""
    from nuteprune.jobs.plan import config_of
    from nuteprune.jobs.sources import read_config
    from nuteprune.plan.need import on_cpu
    from nuteprune.plan.phases import Plan

    config, dtype = config_of(model), getattr(torch, cell.dtype)
    values = read_config(model)
    stored = getattr(torch, str(values.get("dtype") or values.get("torch_dtype")))
    with tempfile.TemporaryDirectory() as out:
        run = Plan.of(config, cell.arguments(out), cell.length, dtype, stored=stored)
        phases = run.phases()
    return {name: round(peak) for name, peak in on_cpu({x.name: x.need for x in phases}).items()}


def llama_1b(folder: Path) -> None:
    """Write a model of random weights."""
    from transformers import AutoConfig

    from nuteprune.plan.walk import model_of

    torch.manual_seed(0)
    model_of(AutoConfig.for_model(**LLAMA_1B), torch.bfloat16).save_pretrained(folder)


def in_a_process(cell: Cell, model: str) -> dict[str, int]:
    """Return what `measured` finds in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, __file__, "--one", json.dumps([asdict(cell), model, out])]
        # What is freed goes back at once: a plan is of what is held, not of the allocator's heap.
        given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
        run = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=given)
        found = run.stdout
    peaks: dict[str, int] = json.loads(found.splitlines()[-1])
    return peaks


def compared(cell: Cell, model: str) -> dict[str, Any]:
    """Plan and measure a cell, and print its table."""
    plan, found = planned(cell, model), in_a_process(cell, model)
    print(f"\n{cell.model}, {cell.name}: {cell.dtype}, blocks of {cell.length}, {cell.settings}")
    print(f"{'':28}{'planned MB':>12}{'measured MB':>12}{'ratio':>8}{'off MB':>9}")
    for phase, peak in found.items():
        told = plan.get(phase, 0)
        print(f"{phase:28}{told / 1e6:12.0f}{peak / 1e6:12.0f}", end="")
        print(f"{told / peak:8.2f}{(told - peak) / 1e6:9.0f}{'' if true(told, peak) else '  off'}")
    sys.stdout.flush()
    return {**asdict(cell), "planned": plan, "measured": found}


def true(told: float, peak: float) -> bool:
    """Return whether a plan is within 10 % or 100 MB of what was measured."""
    return abs(told - peak) <= max(0.1 * peak, 100e6)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Plan and measure, print tables, and return what `--json` writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=sorted({x.model for x in CELLS}))
    parser.add_argument("--names", nargs="+", default=sorted({x.name for x in CELLS}))
    parser.add_argument("--json", metavar="FILE", help="where to write all figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        values, model, out = json.loads(args.one)
        print(json.dumps(measured(Cell(**values), model, out, Watch)))
        return []
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for cell in CELLS:
            if cell.model not in args.models or cell.name not in args.names:
                continue
            model = cell.model
            if model == "llama-1b":
                model = str(Path(scratch) / "model")
                if not Path(model).exists():
                    llama_1b(Path(model))
            results.append(compared(cell, model))
    if args.json:
        Path(args.json).write_text(json.dumps(results) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
