"""Small models and text for the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nuteprune import NutePruneConfig
from nuteprune.console import silent
from nuteprune.data.training_text import BlockDataset
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.products import Products
from nuteprune.progressive.config import ProgressiveConfig
from nuteprune.stages import Prunable
from nuteprune.train.constraints import make_allocator
from nuteprune.train.first_stages import FirstStages
from nuteprune.train.prepare import prepare
from tests.train.conftest import PROGRESSIVE

TEXT = torch.randint(3, 96, (40, 16), generator=torch.Generator().manual_seed(0))
KINDS = ("kv_groups", "neurons")


def settings(folder: Path, **more: Any) -> NutePruneConfig:
    common = {"use_cpu": True, "calibration_blocks": 4, "neuron_multiple": 4, "max_steps": 2}
    kind = ProgressiveConfig if more.keys() & PROGRESSIVE else NutePruneConfig
    return kind(output_dir=str(folder), **{**common, **more})


def plain(model: Any, folder: Path) -> Prunable:
    """A model without LoRA."""
    anatomy = Anatomy(model.requires_grad_(False))
    allocator = make_allocator(anatomy, settings(folder))
    return Prunable(anatomy, MaskHooks(anatomy), LoraBank(anatomy), allocator, is_sharded=False)


def cut_of(model: Any, folder: Path, products: Products | None = None, **more: Any) -> FirstStages:
    """The stages before the first step; of a run that shares weights out, where that is asked."""
    args = settings(folder, **{k: v for k, v in more.items() if k != "sharded"})
    prepared = prepare(model, args)
    args.sharded = more.get("sharded", False)
    kept = products or Products(None, {})
    return FirstStages(prepared, args, BlockDataset(TEXT), kept, silent)
