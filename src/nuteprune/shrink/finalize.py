"""Merge LoRA and fold masks into the weights, in fp32.

What comes out is the stock model at full size, with rows and columns of what is pruned set to
zero. Slicing it changes no output.

Shape suffixes: O rows (output features), I columns (input features), D hidden width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy


@torch.no_grad()
def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Add the LoRA weights to the base weights, in fp32, and take the adapters off.

    Args:
        model: a model wrapped by PEFT; its base model is changed in place.

    Returns:
        The stock model.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = cast(nn.Linear, module.get_base_layer()).weight
            delta_OI = sum(
                cast(Any, module).get_delta_weight(name).float() for name in module.lora_A
            )
            weight.copy_((weight.float() + delta_OI).to(weight.dtype))
    return cast(PreTrainedModel, model.unload())


@torch.no_grad()
def fold_masks(anatomy: Anatomy, masks: Masks) -> None:
    """Multiply masks into the weights, in place: masked activations become plain ones.

    Heads and neurons scale columns of the output and down projections, block and hidden gates
    scale their rows (block gates a post-norm where there is one), hidden gates also the embedding.
    Where the head is tied to the embedding, the final norm divides the hidden gates out again.
    """
    family = anatomy.family
    for i in range(len(anatomy.layers)):
        for projection, columns, block in (
            (family.attention[-1], masks.attention_input(i), "attn_block"),
            (family.mlp[-1], masks.mlp_input(i), "mlp_block"),
        ):
            linear = anatomy.linear(i, projection)
            if linear is None:
                continue
            fold_columns(linear, columns)
            fold_rows(linear, masks.hidden)
            gate, post_norm = masks.part(block, i), anatomy.post_norm(i, block)
            if post_norm is None:
                fold_rows(linear, gate)
            elif gate is not None:
                scale_norm(anatomy, post_norm, gate.to(cast(Tensor, post_norm.weight).device))
    if masks.hidden is not None:
        _fold_hidden(anatomy, masks.hidden)


def fold_columns(linear: nn.Linear, scale_I: Tensor | None) -> None:
    """Scale the columns of a weight."""
    if scale_I is not None:
        weight = linear.weight
        weight.copy_((weight.float() * scale_I.to(weight.device)).to(weight.dtype))


def fold_rows(linear: nn.Linear, scale_O: Tensor | None) -> None:
    """Scale the rows of a weight and its bias."""
    if scale_O is None:
        return
    for parameter in (linear.weight, linear.bias):
        if parameter is not None:
            scale = scale_O.to(parameter.device)
            scale = scale.unsqueeze(-1) if parameter.dim() == 2 else scale
            parameter.copy_((parameter.float() * scale).to(parameter.dtype))


def _fold_hidden(anatomy: Anatomy, scale_D: Tensor) -> None:
    tied = anatomy.tied
    embedding = cast(Tensor, anatomy.embedding.weight)
    scale_D = scale_D.to(embedding.device)
    embedding.copy_((embedding.float() * scale_D).to(embedding.dtype))
    if tied:
        inverse_D = torch.where(scale_D > 0, 1 / scale_D.clamp(min=1e-12), torch.ones_like(scale_D))
        scale_norm(anatomy, anatomy.final_norm, inverse_D)


def scale_norm(anatomy: Anatomy, norm: nn.Module, factor: Tensor | float) -> None:
    """Multiply what an RMSNorm puts out by a factor, whether it stores w or w with 1 + w meant."""
    offset = 1.0 if anatomy.family.norm == "rms_1p" else 0.0
    weight = cast(Tensor, norm.weight)
    weight.copy_(((weight.float() + offset) * factor - offset).to(weight.dtype))
