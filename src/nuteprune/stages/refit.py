"""Refit: the weights that stay, by least squares; see `shrink.least_squares`.

Shape suffixes: N blocks, T tokens of a block, O rows, I columns of a weight.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from nuteprune.console import Progress, counted, silent
from nuteprune.gates.masks import Masks
from nuteprune.model.family import Projection
from nuteprune.model.layerwise import BATCH
from nuteprune.model.lora import Weights
from nuteprune.model.weights import weight_of
from nuteprune.shrink.least_squares import Fit, InstallStack, fit_projections
from nuteprune.stages import Prunable

FEWER_DIRECTIONS = 32
"""Rank of a refit where weights are packed, so that LoRA alone can hold it."""


@torch.no_grad()
def refit(
    model: Prunable,
    masks: Masks,
    blocks: Tensor,
    *,
    rank: int = FEWER_DIRECTIONS,
    progress: Progress = silent,
) -> Weights:
    """Fit the output and down projections of all layers to the inputs that masks leave.

    Args:
        model: the model.
        masks: the final masks.
        blocks: token ids (N, T) of calibration text.
        rank: of LoRA, which holds the fit where weights are packed.
        progress: told of each layer.

    Returns:
        By name, as `LoraBank` has them: whole weights (O, I) whose columns are 0 where inputs are
        gone, mapped from files on CPUs, and where weights are sharded, with data in the main
        process alone; or LoRA's two sides where weights are packed.
    """
    bank, anatomy = model.bank, model.anatomy
    whole = not model.is_packed

    def install(layer: int, projection: Projection, fit: Fit) -> None:
        if whole:
            bank.set_weight(layer, projection, fit.weight_OI)
            return
        from nuteprune.shrink.low_rank import low_rank  # packed weights alone need it

        base = anatomy.linear(layer, projection)
        assert base is not None
        bank.set_delta(layer, projection, *low_rank(fit, weight_of(base), rank))

    stacks: InstallStack | None = bank.set_weight if whole else None
    tick = counted(progress, "refit", len(anatomy.layers))
    batches = blocks.split(BATCH)
    where = anatomy, model.hooks, masks
    with bank.kept(), bank.silent_left_out() if whole else nullcontext():
        fit_projections(*where, batches, install, tick, bank.as_dense, stacks, model.team)
        return bank.weights() if whole else {k: v.clone() for k, v in bank.state().items()}
