"""What the student is asked for: the weighted terms of the distillation loss.

Shape suffixes: B batch, T tokens, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nuteprune.distill.coforward import Passage
from nuteprune.distill.losses import LAYER_TERMS, Head, LayerTerm, token_kl


@dataclass(frozen=True)
class Objective:
    """The terms and their weights.

    Args:
        token_weight: weight of the token-level KL divergence.
        layer_weight: weight of the layers' terms, 0 for none of them.
        layer_term: `relative`: their mean over layers; `mse`: their sum, as published.
        temperature: softening of both token distributions.
    """

    token_weight: float = 1.0
    layer_weight: float = 1.0
    layer_term: str = "relative"
    temperature: float = 1.0

    @property
    def layer_distance(self) -> LayerTerm | None:
        """How far a layer's output is from the teacher's; None if it does not matter."""
        return LAYER_TERMS[self.layer_term] if self.layer_weight else None

    def parts(self, passage: Passage, head: Head, weight_BT: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of a pass, `token_kl` and `layer`, as far as it has them.

        Args:
            passage: what a co-forward pass left.
            head: the language head that both roles share.
            weight_BT: weight of each token, 0 for padding.
        """
        parts = {}
        if passage.teacher_BTD is not None and passage.student_BTD is not None:
            kl = token_kl(
                passage.student_BTD, passage.teacher_BTD, head, weight_BT, self.temperature
            )
            parts["token_kl"] = self.token_weight * kl
        if passage.layer_loss is not None:
            count = 1 if self.layer_term == "mse" else passage.layers
            parts["layer"] = self.layer_weight * passage.layer_loss / count
        return parts
