"""What a scoring reads: the model's live parts, its parameter count, calibration text.

Shape suffixes: B batch, T tokens, N units of one kind in the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nuteprune.errors import RunFailed
from nuteprune.gates.budget import Budget
from nuteprune.gates.masks import Layout
from nuteprune.model.anatomy import Anatomy, no_logits
from nuteprune.model.hooks import MaskHooks
from nuteprune.simulated import usual

LOSS_SCALE = 2.0**10
"""What a loss is multiplied by before its backward pass, and gradients divided by after it: float16
would round small ones to 0. A power of two, so nothing else changes."""
Scores = dict[str, Tensor]
"""Kind -> (N,) losses in fp32 on the CPU."""


@dataclass(frozen=True)
class Probe:
    """What a model is scored with.

    Args:
        anatomy: the dense model; its parameters are frozen, or their gradients are not wanted.
        hooks: where masks multiply in it.
        budget: its parameter count.
        kinds: which kinds of gates to score.
        batches: token ids (B, T) of calibration text.
        plain_batches: token ids (B, T), T the same in all, of the text of methods that read more of
            it where no gradients are taken.
        seed: draws the random scores, and tokens from the model.
        progress: called after each batch.
    """

    anatomy: Anatomy
    hooks: MaskHooks
    budget: Budget
    kinds: tuple[str, ...]
    batches: Sequence[Tensor] = ()
    plain_batches: Sequence[Tensor] = ()
    seed: int = 0
    progress: Callable[[], None] = lambda: None

    @property
    def layout(self) -> Layout:
        """The model's units."""
        return Layout(self.budget.shape, self.budget.head_dim)

    @torch.no_grad()
    def read(self) -> None:
        """Run the text through the model, for the hooks that watch."""
        device = self.anatomy.model.device
        for ids_BT in self.batches:
            ids_BT = ids_BT.to(device)
            kept = no_logits(ids_BT)
            self.anatomy.model(input_ids=ids_BT, use_cache=False, logits_to_keep=kept)
            self.progress()


def check_finite(values: Iterable[Tensor], method: str) -> None:
    """Refuse figures of a scoring that overflowed.

    Raises:
        RunFailed: if there are such.
    """
    if not all(usual(value.isfinite().all()) for value in values):
        raise RunFailed(
            f"scoring by {method} gave scores that are not finite: activations or gradients "
            "overflow; use --dtype float32"
        )
