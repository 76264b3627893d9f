"""A trainer on random tokens that takes moments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from nuteprune import NutePruneConfig, NutePruneTrainer
from nuteprune.data.training_text import BlockDataset
from nuteprune.progressive.config import ProgressiveConfig
from nuteprune.progressive.settings import ProgressiveSettings
from nuteprune.progressive.trainer import ProgressiveTrainer
from nuteprune.train.asked import KINDS
from nuteprune.train.declared import declared
from nuteprune.train.settings import PruneSettings

LENGTH = 16
PROGRESSIVE = declared(ProgressiveSettings).keys() - declared(PruneSettings).keys()
"""Settings that masks move by."""
PROGRESSIVE_KINDS: Any = (ProgressiveConfig, ProgressiveTrainer)


def make(
    model: Any,
    out: Path,
    callbacks: list[Any] | None = None,
    eval_dataset: Any = None,
    stored_dtype: torch.dtype | None = None,
    given: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Return a trainer for a tiny model; settings, those of its config, say of which kind."""
    random = torch.Generator().manual_seed(0)
    blocks = BlockDataset(torch.randint(3, 90, (64, LENGTH), generator=random))
    defaults: dict[str, Any] = {
        "target_sparsity": 0.3,
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "neuron_multiple": 4,
        "hidden_multiple": 8,
        "calibration_blocks": 8,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if any(name in settings for name in ("shape", *(f"target_{x}" for x in KINDS))):
        del defaults["target_sparsity"]
    moves = settings.get("teacher") == "snapshots" or settings.keys() & PROGRESSIVE
    config, kind = PROGRESSIVE_KINDS if moves else (NutePruneConfig, NutePruneTrainer)
    args = config(output_dir=str(out), **{**defaults, **settings})
    trainer: Any = kind(
        model,
        args,
        blocks,
        callbacks=callbacks or [],
        eval_dataset=eval_dataset,
        stored_dtype=stored_dtype,
        **(given or {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trial_step(trainer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Go through a micro-batch of a trainer that has masks; leaves its gradients."""
    with trainer.student(inputs):
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    return loss.detach()


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
