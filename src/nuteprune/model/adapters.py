"""Puts LoRA on a model: on its projections, and on the routers of mixtures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn

from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Projection
from nuteprune.model.lora import ADAPTER


def add_lora(anatomy: Anatomy, queries_and_values: bool = False, **settings: Any) -> PeftModel:
    """Wrap a model with LoRA, except output projections of mixers, whose kernels bypass it.

    In mixtures PEFT takes the names of MLPs for those of stacked experts, which it would rebuild in
    each pass. It knows a mixture by the type in its config. A list of layers has no config, so PEFT
    takes the names as they are given.

    Args:
        anatomy: the model, which is changed in place.
        queries_and_values: whether to wrap only the projections that make these.
        **settings: of PEFT's `LoraConfig`: `r`, `lora_alpha`, `lora_dropout`.
    """
    family = anatomy.family
    chosen = [p for p in family.projections if p not in family.mixer[-1:]]
    if queries_and_values:
        chosen = [p for p in family.attention if p.serves_queries_or_values]
    plain = [p for p in chosen if not family.experts or p in family.attention]
    prefix = family.layers.replace(".", r"\.")
    config = LoraConfig(
        target_modules=rf"(.*\.)?{prefix}\.{_names(anatomy, plain)}",
        task_type="CAUSAL_LM",
        **settings,
    )
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


def _names(anatomy: Anatomy, projections: Iterable[Projection]) -> str:
    """Return a regular expression of projections by layer and path, "" if none is there."""
    found = filter(None, (_everywhere(anatomy, x) for x in projections))
    return f"({'|'.join(names)})" if (names := list(found)) else ""


def _everywhere(anatomy: Anatomy, projection: Projection) -> str:
    """Return the regular expression of a projection in the layers that have it, "" if none."""
    count = len(anatomy.layers)
    there = [i for i in range(count) if anatomy.projection(i, projection) is not None]
    if not there:
        return ""
    layers = r"\d+" if len(there) == count else f"({'|'.join(map(str, there))})"
    return layers + r"\." + projection.path.replace(".", r"\.")
