"""One-shot importance: the loss that removing each unit is expected to cost.

Shape suffixes: B batch, T tokens, N units of one kind in the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.hooks import MaskHooks


def fisher(
    model: nn.Module,
    hooks: MaskHooks,
    layout: Layout,
    kinds: Iterable[str],
    batches: Iterable[Tensor],
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of the masks: mean over sequences of (d loss / d mask)^2.

    Half of it is the second-order estimate of the loss that setting a mask to 0 costs. Gradients
    are taken per sequence, at no extra cost, by giving each sequence of a batch its own masks.
    Source: Theis et al. 2018 (arXiv 1801.05787); Kwon et al. 2022 (arXiv 2204.09656).

    Args:
        model: a causal LM whose parameters are frozen (or whose gradients are not wanted).
        hooks: where masks multiply in it.
        layout: the model's units.
        kinds: which kinds of gates to score.
        batches: token ids (B, T) of calibration text.
        progress: called after each batch.

    Returns:
        Kind -> (N,) scores in fp32 on the CPU.
    """
    device = next(model.parameters()).device
    kinds = list(kinds)
    total = {kind: torch.zeros(layout.units(kind)) for kind in kinds}
    sequences = 0
    for ids_BT in batches:
        ids_BT = ids_BT.to(device)
        leaves = {
            kind: torch.ones(len(ids_BT), layout.units(kind), device=device, requires_grad=True)
            for kind in kinds
        }
        with hooks.using(Masks(layout, leaves)):
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        # The model's loss is a mean over sequences; Fisher wants the gradients of their sum.
        grads = torch.autograd.grad(loss * len(ids_BT), list(leaves.values()))
        for kind, grad in zip(kinds, grads, strict=True):
            total[kind] += grad.float().square().sum(0).cpu()
        sequences += len(ids_BT)
        progress()
    return {kind: value / max(1, sequences) for kind, value in total.items()}
