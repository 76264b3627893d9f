"""Slice: LoRA merged, masks folded, rows and columns of what is gone cut out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.export.checkpoint import assemble, rounded_as_stored
from nuteprune.gates.masks import Masks
from nuteprune.memory import mapped
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.lora import Learned
from nuteprune.model.shape import Shape
from nuteprune.processes import is_main, share
from nuteprune.shrink.finalize import merge_layer
from nuteprune.shrink.slicing import Tensors, cut_part


@dataclass(frozen=True)
class Sliced:
    """A smaller model.

    Args:
        model: its weights rounded as they will be stored.
        shape: its dimensions.
    """

    model: PreTrainedModel
    shape: Shape


def slice_model(
    dense: PreTrainedModel,
    masks: Masks,
    learned: Learned,
    *,
    computed_dtype: torch.dtype,
    stored_dtype: torch.dtype,
    folder: Path | None = None,
    sharded: bool = False,
) -> Sliced:
    """Return the smaller model.

    Args:
        dense: the dense model without adapters; it is used up.
        masks: the final masks.
        learned: what was learned, as `LoraBank.learned` has it; it is used up.
        computed_dtype: what the run computed in.
        stored_dtype: of the checkpoint that the dense model is from, which the result keeps.
        folder: where a CPU has room for weights; None: they stay in memory.
        sharded: whether the main process alone has what was learned, and cuts; all call this.

    Raises:
        UserError: if the masks are of another model.
    """
    anatomy = Anatomy(dense.eval())
    if anatomy.shape != masks.layout.shape:
        raise UserError(
            "the dense model given is not the one that was trained: its dimensions differ; "
            "load the run's own model again"
        )
    exact = torch.promote_types(dense.dtype, torch.promote_types(stored_dtype, computed_dtype))
    masks, state = masks.to("cpu"), Tensors()
    for layer in (*range(len(anatomy.layers)), None) if is_main() or not sharded else ():
        for parameter in (dense if layer is None else anatomy.layers[layer]).parameters():
            parameter.data = parameter.data.to(exact)
        if layer is not None:
            merge_layer(anatomy, layer, learned, computed_dtype)
        part = rounded_as_stored(cut_part(anatomy, masks, layer), stored_dtype)
        state |= part if folder is None else mapped(part, folder)
        del part  # large
    if sharded:  # in the other processes tensors have room, and no values
        shared = share(state or None, values=False) or {}
        state = state or {name: torch.empty_like(x, device="cpu") for name, x in shared.items()}
    return Sliced(*assemble(anatomy, masks, state))
