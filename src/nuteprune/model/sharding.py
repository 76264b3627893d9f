"""Base weights sharded over processes (FSDP2); trained weights stay whole on each process.

Each decoder layer is gathered once per pass, serves both roles of a co-forward pass, and is let go.

Shape suffixes: O rows of a weight, or experts of a stack; I the rest of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nuteprune.errors import UserError
from nuteprune.model.anatomy import Anatomy
from nuteprune.processes import is_main


def shard_base(anatomy: Anatomy, device: torch.device) -> None:
    """Shard a model's frozen parameters over all processes of a run, in place, layer by layer.

    Call it once hooks and LoRA are there, before `CoForward.roles`. Parameters that require
    gradients (LoRA, gates) are left alone: their gradients are this process's own until
    DDP around the model averages them.

    Args:
        anatomy: the model, wrapped by PEFT.
        device: of this process; all have one of its type.

    Raises:
        UserError: if this version of torch cannot.
    """
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UserError(f"sharding needs a newer version of torch than {torch.__version__}")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*anatomy.layers, anatomy.model):
        trained = {p for p in module.parameters() if p.requires_grad}
        fully_shard(module, mesh=mesh, ignored_params=trained)
    for parameter in trained:  # FSDP2 places those alone that it shards
        parameter.data = parameter.data.to(device.type)


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module's weights are sharded, and gathered when it is called."""
    return isinstance(module, FSDPModule)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather a sharded module's weights inside the context, in all processes alike.

    For code that reads or runs parts of a module without calling it. Modules that are not sharded
    stay as they are, and so do those that are gathered already.
    """
    shards = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    if not isinstance(module, FSDPModule) or not shards:
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


@torch.no_grad()
def put_rows(weight_OI: DTensor, whole_OI: Tensor) -> None:
    """Overwrite a sharded weight; all processes take part, and each receives its rows alone.

    Args:
        weight_OI: the weight, changed in place.
        whole_OI: its new values; those of the main process alone are read.
    """
    device, dtype = weight_OI.device, weight_OI.dtype
    if is_main():
        sent_OI = whole_OI.to(device, dtype)
    else:
        sent_OI = torch.empty(weight_OI.shape, dtype=dtype, device=device)
    rows_OI = distribute_tensor(sent_OI, weight_OI.device_mesh, weight_OI.placements)
    weight_OI.to_local().copy_(rows_OI.to_local())
