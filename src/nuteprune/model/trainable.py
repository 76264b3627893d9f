"""What is trained and what is frozen: LoRA on a model, and the places whose weights change.

Shape suffixes: O rows and I columns of a weight, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Projection
from nuteprune.model.weights import is_sharded
from nuteprune.simulated import usual

ADAPTER = "default"


def add_lora(anatomy: Anatomy, queries_and_values: bool = False, **settings: Any) -> PeftModel:
    """Freeze a model, and wrap it with LoRA, which alone is trained.

    LoRA is on all projections except the output projections of mixers, whose kernels bypass it.

    In mixtures PEFT takes the names of MLPs for those of stacked experts, which it would rebuild in
    each pass. It knows a mixture by the type in its config. A list of layers has no config, so PEFT
    takes the names as they are given.

    Args:
        anatomy: the model, which is changed in place.
        queries_and_values: whether to wrap only the projections that make these.
        **settings: of PEFT's `LoraConfig`: `r`, `lora_alpha`, `lora_dropout`.
    """
    anatomy.model.requires_grad_(False)
    family = anatomy.family
    chosen = [p for p in family.projections if p not in family.mixer[-1:]]
    if queries_and_values:
        chosen = [p for p in family.attention if p.serves_queries_or_values]
    plain = [p for p in chosen if not family.experts or p in family.attention]
    prefix = family.layers.replace(".", r"\.")
    targets = rf"(.*\.)?{prefix}\.{_names(anatomy, plain)}"
    config = LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **settings)
    adapted = cast(PeftModel, get_peft_model(anatomy.model, config))
    if family.experts and not queries_and_values:
        parts: list[dict[str, Any]] = []
        if others := _names(anatomy, [p for p in chosen if p not in plain]):
            parts.append({"target_modules": others})
        # PEFT adds up weights there, not outputs, so no inputs can be dropped.
        router = f"{family.experts.router}.weight"
        parts.append({"target_parameters": [router], "lora_dropout": 0.0})
        for part in parts:
            # A list of its own, on which PEFT leaves the settings.
            layers = nn.ModuleList(anatomy.layers)
            inject_adapter_in_model(LoraConfig(**(settings | part)), layers, ADAPTER)
        cast_adapter_dtype(adapted, ADAPTER)  # as PEFT itself did for attention
    return adapted


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


def _names(anatomy: Anatomy, projections: Iterable[Projection]) -> str:
    """Return a regular expression of projections by layer and path, "" if none is there."""
    count, names = len(anatomy.layers), []
    for projection in projections:
        there = [str(i) for i in range(count) if anatomy.projection(i, projection) is not None]
        if there:
            layers = r"\d+" if len(there) == count else f"({'|'.join(there)})"
            names.append(layers + r"\." + projection.path.replace(".", r"\."))
    return f"({'|'.join(names)})" if names else ""


def sides_of(lora: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return LoRA's weights: A (R, I) and B (O, R)."""
    return cast(Tensor, lora.lora_A[ADAPTER].weight), cast(Tensor, lora.lora_B[ADAPTER].weight)


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

    @torch.no_grad()
    def silence(self) -> None:
        """Let LoRA add nothing here yet."""
        if self.lora is not None:
            sides_of(self.lora)[1].zero_()

    @property
    def is_silent(self) -> bool:
        """Whether LoRA is here and adds nothing."""
        return self.lora is not None and usual(~sides_of(self.lora)[1].any())

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
