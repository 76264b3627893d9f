"""What runs on large models would take, from their configs alone: tables of docs/tables.md.

    python benchmarks/plan_tables.py --json benchmarks/results/plan-large.json

Nothing here is measured: each phase of a run is gone through on tensors without data, as `nuteprune
plan` does it. What sharding and few bits save is by formula.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from nuteprune import NutePruneConfig
from nuteprune.jobs.plan import variants_of
from nuteprune.plan.phases import NOT_SHARED, Plan

RESULTS = Path(__file__).with_name("results") / "plan-large.json"
LLAMA: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-8B": QWEN3
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
    },
    "Qwen3-32B": QWEN3
    | {
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "intermediate_size": 25600,
    },
    "Llama-3.1-70B": LLAMA
    | {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 28672,
    },
}
"""Shapes as published in the models' config.json."""
DEVICES = (8, 64)
WAYS = [(n, way) for n in DEVICES for way in ("whole", "sharded")]
"""Devices, and whether their weights are whole on each."""
LENGTH, BATCH, ACCUMULATED, STEPS, SPARSITY = 512, 4, 4, 80, 0.2


def planned(name: str) -> dict[str, Any]:
    """Return what a run on a model takes: GB on a device by setting and phase."""
    config = AutoConfig.for_model(tie_word_embeddings=False, **CONFIGS[name])
    with tempfile.TemporaryDirectory() as out:
        args = NutePruneConfig(
            output_dir=out,
            use_cpu=True,
            target_sparsity=SPARSITY,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATED,
        )
        run = Plan.of(config, args, LENGTH, torch.bfloat16)
        phases = run.phases()
        variants = list(variants_of(run, phases, DEVICES))
    columns = {"as asked": {x.name: x.need.peak for x in phases}}
    sharded = iter(DEVICES)
    for variant in variants[1:]:
        label = variant.settings
        if "sharded" in label:
            label = f"{label}, {next(sharded)} devices"
        columns[label] = dict(variant.peaks)
    return {
        "model": name,
        "weights_bytes": run.sizes.weights,
        "steps": args.max_steps,
        "peak_bytes": columns,
        "flops": {x.name: x.need.flops for x in phases},
        "sent_bytes": {
            x.name: {f"{way}, {n} devices": x.need.sent(n, way == "sharded") for n, way in WAYS}
            for x in phases
        },
        "disk_bytes": run.disk(),
    }


SHORT = {
    f"--batch-size 1 --set gradient_accumulation_steps={BATCH * ACCUMULATED}": "batch of 1",
    "batch of 1 --gradient-checkpointing": "and checkpointing",
    "and checkpointing --": "and ",
    "set sharded=true": "sharded",
}
"""Settings -> what tables say; each column has what the one before it has, up to checkpointing."""


def short(settings: str) -> str:
    """Return what a table says in place of settings."""
    for long, word in SHORT.items():
        settings = settings.replace(long, word)
    return settings


def table(plan: dict[str, Any]) -> str:
    """Return a plan as a table of GB, a row for each phase."""
    columns = plan["peak_bytes"]
    lines = [
        f"**{plan['model']}**, {plan['weights_bytes'] / 1e9:.1f} GB of weights (simulated)",
        "",
        "| GB on each device | " + " | ".join(map(short, columns)) + " | PFLOP |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for phase, flops in plan["flops"].items():
        cells = [f"{x[phase] / 1e9:.1f}" if phase in x else "-" for x in columns.values()]
        lines.append(f"| {phase} | " + " | ".join(cells) + f" | {flops / 1e15:,.1f} |")
    most = [f"**{max(x.values()) / 1e9:.1f}**" for x in columns.values()]
    lines.append(
        "| largest | " + " | ".join(most) + f" | {sum(plan['flops'].values()) / 1e15:,.0f} |"
    )
    return "\n".join(lines)


def traffic(plan: dict[str, Any]) -> str:
    """Return what devices send and multiply as a table, a row for each phase."""
    columns = next(iter(plan["sent_bytes"].values()))
    heads = [f"GB sent, {x}" for x in columns] + [f"PFLOP, {n} devices" for n in DEVICES]
    lines = ["| on each device | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for phase, sent in plan["sent_bytes"].items():
        shares = [1 if phase in NOT_SHARED else n for n in DEVICES]
        cells = [f"{x / 1e9:,.1f}" for x in sent.values()]
        cells += [f"{plan['flops'][phase] / n / 1e15:,.2f}" for n in shares]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(plans: Sequence[dict[str, Any]]) -> str:
    """Return the largest peaks of plans as a table of GB, a row for each model."""
    columns = plans[0]["peak_bytes"]
    lines = [
        "| GB on each device (simulated) | weights | " + " | ".join(map(short, columns)) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for plan in plans:
        sizes = [plan["weights_bytes"], *(max(x.values()) for x in plan["peak_bytes"].values())]
        lines.append(f"| {plan['model']} | " + " | ".join(f"{x / 1e9:.1f}" for x in sizes) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--json", metavar="FILE", help="where to write all figures")
    args = parser.parse_args(arguments)
    plans = []
    for name in args.models:
        plans.append(planned(name))
        print(table(plans[-1]), traffic(plans[-1]), sep="\n\n", flush=True)
        print()
        if args.json:
            Path(args.json).write_text(json.dumps(plans) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
