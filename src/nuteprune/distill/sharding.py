"""Base weights sharded over processes (FSDP2); what is trained stays whole on each of them.

For a training loop of one's own around the co-forward pass; `NutePruneTrainer` replicates. Each
decoder layer is gathered once per pass and serves both roles before it is let go.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from nuteprune.model.anatomy import Anatomy


def shard_base(model: nn.Module, anatomy: Anatomy, mesh: DeviceMesh) -> None:
    """Shard a model's frozen parameters in place, layer by layer.

    Call it once hooks and LoRA are there, before `CoForward.roles`. Parameters that require
    gradients (LoRA, gates) are left alone: their gradients are this process's own until
    `average_gradients`.

    Args:
        model: what is called in training: the model wrapped by PEFT.
        anatomy: its parts.
        mesh: the processes, in one dimension.
    """
    for module in (*anatomy.layers, model):
        trained = {p for p in module.parameters() if p.requires_grad}
        fully_shard(module, mesh=mesh, ignored_params=trained)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over all processes: FSDP2 leaves those of ignored parameters alone.

    Args:
        parameters: what is trained, in the same order everywhere; without a gradient it counts
            as one of zeros.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
