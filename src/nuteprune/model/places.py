"""The places of a model whose weights a run trains or replaces."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nuteprune.model.anatomy import Anatomy
from nuteprune.model.sharding import is_sharded


class Place(NamedTuple):
    """A place that a run trains: its name, the base's weight, LoRA beside it, and its layer."""

    name: str
    holder: nn.Module
    key: str
    lora: LoraLayer | None
    layer: Any

    @property
    def weight(self) -> Any:
        """The weight that the model computes with; of a sharded layer whole once it is gathered."""
        return self.holder._parameters[self.key]

    @weight.setter
    def weight(self, value: Any) -> None:
        self.holder._parameters[self.key] = value

    @property
    def rows(self) -> Any:
        """This process's rows of a sharded weight, to be read or written."""
        self.layer.reshard()  # what is gathered would not follow
        return self.weight

    def own(self) -> Tensor:
        """Return the weight, for `put_back`; of a sharded one a copy of this process's rows."""
        whole = not is_sharded(self.layer)
        return cast(Tensor, self.weight if whole else self.rows.detach().clone())

    def put_back(self, own: Tensor) -> None:
        """Put back what `own` returned."""
        if isinstance(own, DTensor):
            self.rows.to_local().copy_(own.to_local())
        else:
            self.weight = own


def places_of(anatomy: Anatomy, layer: int) -> dict[str, Place]:
    """Return path -> place of a layer: where LoRA is, and what stacked experts write by."""
    around = anatomy.layers[layer]
    found = {
        path: Place(f"{layer}.{i}", module.get_base_layer(), "weight", module, around)
        for i, (path, module) in enumerate(anatomy.lora_layers(layer).items())
    }
    if (mixture := anatomy.mixture(layer)) is not None:
        path = mixture.down.path
        key = path.rpartition(".")[2]
        found[path] = Place(f"{layer}.experts", mixture.experts, key, None, around)
    return found
