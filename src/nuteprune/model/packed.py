"""Weights in 8 or 4 bits (bitsandbytes): counted, read and refused."""

from __future__ import annotations

from typing import Any, cast

from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nuteprune.errors import UserError

BITS_AND_BYTES = "bitsandbytes"
"""The quantizer whose weights can be computed with, differentiated through and unpacked."""


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
            "the model's weights are quantised, and only whole ones can be exported: pass the "
            "checkpoint that it was made of"
        )


def make_trainable(model: PreTrainedModel) -> None:
    """Let gradients pass through packed weights; other weights stay as they are.

    Raises:
        UserError: if they were packed by another quantizer, or cannot be unpacked here.
    """
    if not is_packed(model):
        return
    if getattr(model, "quantization_method", None) != BITS_AND_BYTES:
        raise UserError(
            "the model's weights are quantised, and not by bitsandbytes, with which alone it can "
            "be pruned in 8 or 4 bits; load it in bfloat16, or with BitsAndBytesConfig"
        )
    for name, module in model.named_modules():
        packed, weight = cast(Any, module), cast(Any, getattr(module, "weight", None))
        state = getattr(weight, "quant_state", None)
        if state is None:  # whole, or in 8 bits
            continue
        # On CPUs, bitsandbytes 0.50 takes the scales of rows that no block ends with wrongly ...
        if weight.device.type == "cpu" and packed.in_features % state.blocksize:
            raise UserError(
                f"{name} has {packed.in_features} inputs, and in 4 bits a CPU unpacks rightly only "
                f"multiples of {state.blocksize}; use 8 bits, or another device"
            )
        # ... and packs anew, into a form without gradients, what runs without them once.
        packed.support_avx512bf16_for_cpu = False


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


def forget_packed(module: nn.Module) -> None:
    """Drop the copies of its weights that a module in 8 bits holds beside its parameters."""
    state = cast(Any, getattr(module, "state", None))
    if hasattr(state, "CB"):
        state.CB = state.SCB = None
