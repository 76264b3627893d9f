"""How base weights are held: in 8 or 4 bits, in main memory or on disk, or shared out (FSDP2).

Packed weights (bitsandbytes) are counted, read and refused.

An offloaded weight says that it is on the device, but has no data there. An operation that reads it
gets a copy of them, and so does the backward pass: what autograd keeps is the weight itself. So
nothing that reads weights need know of it. Copies of the layer that was read last are kept, and
both roles of a co-forward pass read the same ones.

Sharded layers are gathered once per pass, serve both roles, and are let go. Trained weights stay
whole on each process.

Shape suffixes: O rows of a weight, or experts of a stack; I the rest of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.memory import mapped
from nuteprune.processes import agree, is_main
from nuteprune.simulated import gather, let_go

if TYPE_CHECKING:
    from nuteprune.model.anatomy import Anatomy


def is_packed(model: PreTrainedModel) -> bool:
    """Return whether a model's weights are in fewer bits than they are computed in."""
    return bool(getattr(model, "is_quantized", False))


def refuse_packed(model: PreTrainedModel) -> None:
    """Refuse weights in fewer bits where whole ones are to be written.

    Raises:
        UserError: if a model has packed weights.
    """
    if is_packed(model):
        raise UserError(
            "weights are quantised, and only whole ones can be exported: pass the dense checkpoint"
        )


def weight_of(linear: nn.Linear) -> Tensor:
    """Return a projection's weight (O, I), unpacked where it is in 8 or 4 bits or sharded.

    All processes must call it for a sharded weight.
    """
    weight: Any = linear.weight
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    if not weight.is_floating_point():
        weight = dequantize_bnb_weight(weight, getattr(linear, "state", None))
    return cast(Tensor, weight.detach())


def count(parameter: nn.Parameter) -> int:
    """Return how many weights a parameter holds: two per byte where they have 4 bits."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else int(packed.shape.numel())


# -- shared out over processes


def shard_base(anatomy: Anatomy, device: torch.device, sent_in: torch.dtype | None = None) -> None:
    """Shard a model's frozen parameters over all processes of a run, in place, layer by layer.

    Call it once hooks and LoRA are there, before `CoForward.roles`. Parameters that require
    gradients (LoRA, gates) are left alone: their gradients are this process's own until
    DDP around the model averages them.

    Args:
        anatomy: the model, wrapped by PEFT or plain.
        device: of this process; all have one of its type.
        sent_in: a dtype that the main process sends its weights to the others in; None: each has
            them itself.

    Raises:
        UserError: if this version of torch cannot.
    """
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UserError(f"sharding needs a newer version of torch than {torch.__version__}")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*anatomy.layers, anatomy.model):
        trained = {p for p in module.parameters() if p.requires_grad}
        for parameter in module.parameters() if sent_in else ():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(sent_in)
                agree([parameter.data])
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
        gather(module)
        try:
            yield
        finally:
            let_go()
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


# -- in main memory or on disk


class Desk:
    """Copies on a device of one layer's weights: of the one that was read last.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._layer: int | None = None
        self._copies: dict[Tensor, Tensor] = {}

    def copy_of(self, home: Tensor, layer: int) -> Tensor:
        """Return a layer's weight as it is here."""
        if layer != self._layer:
            self._layer, self._copies = layer, {}
        if home not in self._copies:
            self._copies[home] = home.to(self.device)
        return self._copies[home]


class Away(Tensor):
    """An offloaded weight, or a view of one: it reports the device, its data are elsewhere.

    Args:
        view: the part of `home` that this is.
        home: the whole weight where it is stored, contiguous.
        layer: the decoder layer that has it.
        desk: the copies on the device.
    """

    view_of_home: Tensor
    home: Tensor
    layer: int
    desk: Desk
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, view: Tensor, home: Tensor, layer: int, desk: Desk) -> Away:
        """Make a shell without data."""
        shell: Any = Tensor._make_wrapper_subclass(
            cls,
            view.shape,
            strides=view.stride(),
            storage_offset=view.storage_offset() - home.storage_offset(),
            dtype=view.dtype,
            device=desk.device,
        )
        shell.view_of_home, shell.home, shell.layer, shell.desk = view, home, layer, desk
        return cast(Away, shell)

    def here(self) -> Tensor:
        """Return the weight on the device."""
        view, copy = self.view_of_home, self.desk.copy_of(self.home, self.layer)
        start = view.storage_offset() - self.home.storage_offset()
        return copy.as_strided(view.shape, view.stride(), copy.storage_offset() + start)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the device; a view of an offloaded weight is offloaded too."""
        kwargs = kwargs or {}
        if func.is_view:
            this, *others = args
            views = func(this.view_of_home, *others, **kwargs)

            def away(view: Any) -> Any:
                is_view = isinstance(view, Tensor)
                return cls(view, this.home, this.layer, this.desk) if is_view else view

            return return_and_correct_aliasing(func, args, kwargs, tree_map(away, views))
        if func._schema.is_mutable and isinstance(args[0], Away):
            raise RuntimeError(f"{func} would write to a copy of a weight that is away")
        there = tree_map(lambda x: x.here() if isinstance(x, Away) else x, (args, kwargs))
        return func(*there[0], **there[1])


def offload(anatomy: Anatomy, device: torch.device, folder: Path | None = None) -> None:
    """Offload a model's decoder layers, in place; their data stay where they are.

    That goes for frozen matrices: norms and biases are small. Mixers are left out, since their
    fused kernels may read memory past all operations; and routers, on whose weights PEFT works.

    Args:
        anatomy: the model, adapters on it or none.
        device: where the model is to run.
        folder: where weights in main memory are put, and mapped from; None: they stay in memory.
    """
    desk = Desk(torch.empty(0, device=device).device)  # with its index, as what is moved there
    made: dict[Tensor, nn.Parameter] = {}
    family = anatomy.family
    staying = [family.mixer_module] if family.mixer else []
    staying += [family.experts.router] if family.experts else []
    for i, layer in enumerate(anatomy.layers):
        for path, module in layer.named_modules():
            if any(f"{path}.".startswith(f"{x}.") for x in staying):
                continue
            for name, weight in module._parameters.items():
                if weight is None or weight.requires_grad or weight.dim() < 2:
                    continue
                if weight not in made:  # else it is shared
                    made[weight] = _away(weight, i, desk, folder)
                module._parameters[name] = made[weight]


def _away(weight: Tensor, layer: int, desk: Desk, folder: Path | None) -> nn.Parameter:
    home = weight.detach().to("cpu").contiguous()
    if folder is not None:
        home = mapped({"weight": home}, folder)["weight"]
    return nn.Parameter(Away(home, home, layer, desk), requires_grad=False)


def like(weight: Tensor, value: Tensor, folder: Path | None) -> Tensor:
    """Return a value that replaces a weight: offloaded if the weight is.

    Args:
        weight: the weight.
        value: on its device, in its dtype.
        folder: where a CPU's values are put, and mapped from; None: they stay in memory.
    """
    if isinstance(weight, Away):
        return _away(value, weight.layer, weight.desk, folder)
    return value if folder is None else mapped({"weight": value}, folder)["weight"]


def home_of(weight: Tensor) -> Tensor:
    """Return the stored data of a weight; one that is not offloaded as it is."""
    return weight.home if isinstance(weight, Away) else weight


def bring_home(model: PreTrainedModel) -> None:
    """Undo `offload`, in place, and move the rest of the model to the CPU."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, Away):
                plain = made.setdefault(weight, nn.Parameter(weight.home, requires_grad=False))
                module._parameters[name] = plain
    model.to("cpu")  # type: ignore[arg-type]
