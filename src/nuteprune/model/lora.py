"""LoRA weights of a wrapped model: read, swapped by pointer, computed in the base's dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor

from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import Projection

ADAPTER = "default"


class LoraBank:
    """Swaps the LoRA weights of decoder layers by pointer; nothing is copied.

    Args:
        anatomy: a model wrapped by PEFT.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._layers: list[list[tuple[str, LoraLayer]]] = [
            [(f"{i}.{j}", module) for j, module in enumerate(anatomy.lora_layers(i))]
            for i in range(len(anatomy.layers))
        ]

    def state(self) -> dict[str, Tensor]:
        """Return the LoRA weights of now (not copies), by layer, projection and side."""
        return {
            f"{name}.{side}": cast(Tensor, parts[ADAPTER].weight)
            for layer in self._layers
            for name, module in layer
            for side, parts in (("A", module.lora_A), ("B", module.lora_B))
        }

    @torch.no_grad()
    def set_delta(self, layer: int, projection: Projection, out_OR: Tensor, in_RI: Tensor) -> None:
        """Overwrite a projection's LoRA weights so that they add out @ in to its weight.

        Directions beyond those given add nothing yet, and can be learned.
        """
        module = self._anatomy.projection(layer, projection)
        assert isinstance(module, LoraLayer)
        scale = module.scaling[ADAPTER]
        side_a = cast(Tensor, module.lora_A[ADAPTER].weight)
        side_b = cast(Tensor, module.lora_B[ADAPTER].weight)
        rank = len(in_RI)
        side_a[:rank].copy_(in_RI)
        side_b[:, :rank].copy_(out_OR / scale)
        side_b[:, rank:].zero_()

    @torch.no_grad()
    def clear(self) -> None:
        """Let LoRA add nothing, as before the first step."""
        for name, value in self.state().items():
            if name.endswith(".B"):
                value.zero_()

    @contextmanager
    def using(self, layer: int, lora: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Run a decoder layer with other LoRA weights, or with none, for a while."""
        if lora is None:
            modules = [module for _, module in self._layers[layer]]
            before = [module._disable_adapters for module in modules]
            for module in modules:
                module._disable_adapters = True
            try:
                yield
            finally:
                for module, disabled in zip(modules, before, strict=True):
                    module._disable_adapters = disabled
            return
        sides = [
            (parts[ADAPTER], f"{name}.{side}")
            for name, module in self._layers[layer]
            for side, parts in (("A", module.lora_A), ("B", module.lora_B))
        ]
        own = [linear._parameters["weight"] for linear, _ in sides]
        for linear, key in sides:
            linear._parameters["weight"] = lora[key]  # type: ignore[assignment]
        try:
            yield
        finally:
            for (linear, _), weight in zip(sides, own, strict=True):
                linear._parameters["weight"] = weight


@contextmanager
def lora_in_base_dtype(anatomy: Anatomy) -> Iterator[None]:
    """Within this context, compute LoRA, which PEFT keeps in fp32, in the base weights' dtype.

    Otherwise each projection casts its inputs to fp32 and keeps that copy for the backward pass:
    twice the memory, and products at half of the speed.
    """
    weight = anatomy.embedding.weight
    half = weight.dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(weight.device.type, weight.dtype if half else None, enabled=half)
    with autocast, disable_input_dtype_casting(anatomy.model, active=half):
        yield
