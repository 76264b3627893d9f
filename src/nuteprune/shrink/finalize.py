"""Merge LoRA and fold masks into the weights, in fp32.

What comes out is the stock model at full size, with rows and columns of what is pruned set to
zero. Slicing it changes no output. Weights get other memory, not other values in the one they have:
that may be a file's.

Shape suffixes: O rows (output features), I columns (input features), R rank, D hidden width; of
stacked experts: E experts, R rows, C columns.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy, Mixture
from nuteprune.model.lora import Learned, Part


def put(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter another value, rounded to its dtype."""
    parameter.data = value.to(parameter.dtype)


def scale(parameter: Tensor | None, factor: Tensor | float) -> None:
    """Multiply a parameter, if there is one, by a factor, in fp32."""
    if parameter is not None:
        factor = factor.to(parameter.device) if isinstance(factor, Tensor) else factor
        put(parameter, parameter.float() * factor)


@torch.no_grad()
def merge_layer(anatomy: Anatomy, layer: int, learned: Learned, computed: torch.dtype) -> None:
    """Merge the learned weights of a layer into it.

    Args:
        anatomy: the run's base model without adapters, or the same one as exact as it is stored.
        layer: which one.
        learned: what the run learned; the layer's parts are taken out.
        computed: the dtype that the run computed in.
    """
    for path in anatomy.family.adapted:
        part = learned.pop((layer, path), None)
        module = anatomy.without_lora(layer, path)
        if part is not None and module is not None:
            put(module.weight, _replaced(module.weight, part, computed))
            sides = (cast(Tensor, x).to(module.weight.device) for x in (part.out_OR, part.in_RI))
            out_OR, in_RI = sides
            put(module.weight, module.weight.float() + ((out_OR @ in_RI) * part.scale).float())
    if (mixture := anatomy.mixture(layer)) is not None:
        stack = mixture.stack(mixture.down)
        if (part := learned.pop((layer, mixture.down.path), None)) is not None:
            put(stack, _replaced(stack, part, computed))


def _replaced(weight_OI: Tensor, part: Part, computed: torch.dtype) -> Tensor:
    """Return the weight plus the change that a refit made.

    Adding the change keeps a base that is more exact than the run's dtype.
    """
    if part.weight_OI is None:
        return weight_OI
    new_OI = part.weight_OI.to(weight_OI.device, computed)
    if weight_OI.dtype == computed:
        return new_OI
    return weight_OI.float() + (new_OI.float() - weight_OI.to(computed).float())


@torch.no_grad()
def fold_layer(anatomy: Anatomy, masks: Masks, layer: int) -> None:
    """Multiply masks into a layer's weights: masked activations become plain ones.

    Heads and neurons scale columns of the output and down projections, block and hidden gates
    scale their rows (block gates a post-norm where there is one).
    """
    inputs = masks.inputs(layer)
    for projection, columns, block in (
        *((x, inputs[block], block) for block, x in anatomy.ends(layer).items()),
        *((x, None, "attn_block") for x in anatomy.family.mixer[-1:]),
    ):
        linear = anatomy.linear(layer, projection)
        if linear is None:
            continue
        _fold(linear, masks.hidden, columns)
        gate, post_norm = masks.part(block, layer), anatomy.post_norm(layer, block)
        if post_norm is None:
            _fold(linear, gate)
        elif gate is not None:
            scale_norm(anatomy, post_norm, gate.to(cast(Tensor, post_norm.weight).device))
    if (mixture := anatomy.mixture(layer)) is not None:
        fold_experts(mixture, masks, layer)


@torch.no_grad()
def fold_experts(mixture: Mixture, masks: Masks, layer: int) -> None:
    """Multiply a layer's masks into the weights of its experts.

    Experts and neurons scale columns of the down projections; the block's and the hidden gates
    scale rows.
    """
    kinds = ("experts", "expert_neurons", "mlp_block", "hidden")
    if not any(kind in masks.values for kind in kinds):
        return
    weight, bias = mixture.stack(mixture.down), mixture.bias(mixture.down)
    scale_ER = torch.ones(mixture.sizes[0], 1, device=weight.device)
    for part in (masks.part("experts", layer), masks.part("mlp_block", layer)):
        if part is not None:
            scale_ER = scale_ER * part.to(weight.device).unsqueeze(-1)
    if masks.hidden is not None:
        scale_ER = scale_ER * masks.hidden.to(weight.device)
    scale(bias, scale_ER)
    scale_ERC = scale_ER.unsqueeze(-1)
    if (part := masks.part("expert_neurons", layer)) is not None:
        scale_ERC = scale_ERC * part.to(weight.device).view(mixture.sizes).unsqueeze(1)
    scale(weight, scale_ERC.transpose(1, 2) if mixture.entry.transposed else scale_ERC)


@torch.no_grad()
def fold_outside(anatomy: Anatomy, masks: Masks) -> None:
    """Multiply hidden gates into the embedding.

    Where the head is tied to it, the final norm divides them out again.
    """
    if masks.hidden is None:
        return
    embedding = anatomy.embedding.weight
    scale_D = masks.hidden.to(embedding.device)
    scale(embedding, scale_D)
    if anatomy.tied:
        inverse_D = torch.where(scale_D > 0, 1 / scale_D.clamp(min=1e-12), torch.ones_like(scale_D))
        scale_norm(anatomy, anatomy.final_norm, inverse_D)


def _fold(linear: nn.Linear, rows_O: Tensor | None, columns_I: Tensor | None = None) -> None:
    """Scale the columns of a weight, and its rows and bias."""
    if columns_I is not None:
        scale(linear.weight, columns_I)
    if rows_O is not None:
        scale(linear.weight, rows_O.unsqueeze(-1))
        scale(linear.bias, rows_O)


def scale_norm(anatomy: Anatomy, norm: nn.Module, factor: Tensor | float) -> None:
    """Multiply an RMSNorm's output by a factor, whether it multiplies by w or by 1 + w."""
    offset, weight = anatomy.norm_offset, cast(Tensor, norm.weight)
    put(weight, (weight.float() + offset) * factor - offset)
