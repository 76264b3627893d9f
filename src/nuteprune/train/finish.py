"""From a trained student to the smaller model: LoRA merged, masks folded, and cut to its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from nuteprune.export.checkpoint import assemble, round_as_stored
from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.lora import LoraBank
from nuteprune.model.shape import Shape
from nuteprune.shrink.finalize import merge_lora
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.setup import lora_config


@dataclass(frozen=True)
class Finished:
    """A smaller model, ready to be written.

    Args:
        model: its weights rounded as they will be stored.
        shape: its dimensions.
        masks: what was kept of the dense model, on the CPU.
        target: the sparsity that was asked for.
    """

    model: PreTrainedModel
    shape: Shape
    masks: Masks
    target: float


def with_lora(
    dense: PreTrainedModel,
    learned: Mapping[str, Tensor],
    args: NutePruneConfig,
    computed: torch.dtype,
) -> PeftModel:
    """Wrap a dense model like a run's own, with what a run that computed in a dtype has learned."""
    config = lora_config(Anatomy(dense), args)
    peft_model = get_peft_model(dense.requires_grad_(False), config)
    LoraBank(Anatomy(peft_model)).load(learned, computed)
    return cast(PeftModel, peft_model)


def free_base(model: PeftModel) -> None:
    """Drop a model's own weights, to make room for another; LoRA and gates stay."""
    for name, module in model.get_base_model().named_modules():
        if "lora_" not in name:
            module._parameters = dict.fromkeys(module._parameters)


def finish(
    model: PeftModel,
    masks: Masks,
    target: float,
    stored_dtype: torch.dtype,
) -> Finished:
    """Merge, fold and slice.

    Args:
        model: a dense model with LoRA, its weights as exact as they are stored; it is used up.
        masks: final ones.
        target: the sparsity that they are for.
        stored_dtype: of the file.
    """
    model.eval()
    anatomy = Anatomy(merge_lora(model))
    small, shape = assemble(anatomy, masks.to("cpu"))
    round_as_stored(small, stored_dtype)  # judged is what will be in the file
    return Finished(small, shape, masks.to("cpu"), target)
