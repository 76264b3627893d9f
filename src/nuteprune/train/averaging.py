"""Tells DDP what to average: trained weights, but not the gates'."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def leave_out(model: nn.Module) -> None:
    """Tell DDP which parameters to ignore.

    The penalty, alike on all processes, is no part of the forward pass that DDP looks at. Frozen
    weights are alike too, or FSDP's: DDP would send them around, and hold them to the end.

    Args:
        model: the model, its gates with it.
    """
    model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
        name
        for name, p in model.named_parameters()
        if ".lagrangian." in name or not p.requires_grad
    ]


def around_sharded(
    model: nn.Module, accelerator: Accelerator, device: torch.device
) -> DistributedDataParallel:
    """Wrap a sharded model, whose trained weights are whole, with DDP; accelerate refuses to."""
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    handler = accelerator.ddp_handler
    settings: dict[str, Any] = handler.to_kwargs() if handler is not None else {}
    here = None if device.type == "cpu" else [device]
    return DistributedDataParallel(model, device_ids=here, **settings)
