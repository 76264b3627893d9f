"""The training loss: its terms and their weights.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nuteprune.distill.coforward import Passage
from nuteprune.distill.losses import (
    IGNORED,
    Head,
    LayerTerm,
    batch_counts,
    language_model_loss,
    layer_mse,
    layer_relative,
    token_kl,
    token_weights,
)


@dataclass(frozen=True)
class Objective:
    """The terms and their weights.

    Args:
        token_weight: weight of the token-level KL divergence.
        layer_weight: weight of the layers' terms, 0 for none of them.
        as_published: whether terms are those of the authors' code: the KL divergence summed over
            the tokens of a sequence, and plain squared errors summed over layers, the last one
            behind the final norm. Else the KL divergence is averaged over tokens, and squared
            errors relative to the teacher's are averaged over layers.
        temperature: softening of both token distributions.
        lm_weight: weight of the language-model loss, 0 for none.
    """

    token_weight: float = 1.0
    layer_weight: float = 1.0
    as_published: bool = False
    temperature: float = 1.0
    lm_weight: float = 0.0

    @property
    def layer_distance(self) -> LayerTerm | None:
        """The distance of a layer's output from the teacher's; None without layer terms."""
        if not self.layer_weight:
            return None
        return layer_mse if self.as_published else layer_relative

    def parts(
        self, passage: Passage, head: Head, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the weighted terms of a pass by name.

        Args:
            passage: the results of a co-forward pass.
            head: the language head that both roles share.
            inputs: the batch: `input_ids` (B, T) and maybe `attention_mask` (B, T).

        Returns:
            `token_kl` and `layer` where a teacher took part, `lm` where it has a weight.
        """
        parts = {}
        if passage.teacher_BTD is not None and passage.student_BTD is not None:
            weight_BT, heat = token_weights(inputs), self.temperature
            kl = token_kl(passage.student_BTD, passage.teacher_BTD, head, weight_BT, heat)
            tokens = weight_BT.sum() / len(weight_BT) if self.as_published else 1
            parts["token_kl"] = self.token_weight * tokens * kl
        if passage.layer_loss is not None:
            count = 1 if self.as_published else passage.layers
            parts["layer"] = self.layer_weight * passage.layer_loss / count
        if self.lm_weight:
            parts["lm"] = self.lm_weight * text_loss(passage, head, inputs)
        return parts

    def by_share(
        self, parts: Mapping[str, Tensor], inputs: Mapping[str, Tensor], mean_3: Tensor
    ) -> dict[str, Tensor]:
        """Return a micro-batch's terms, each weighted by its share of the step.

        Means over tokens are weighted by tokens, sums over a sequence's tokens by sequences.

        Args:
            parts: the terms, as `parts` returns them of this micro-batch.
            inputs: the micro-batch: `input_ids` (B, T) and maybe `attention_mask` (B, T).
            mean_3: `batch_counts` of the mean micro-batch of the step.
        """
        distilled, learned, sequences = (batch_counts(inputs) / mean_3).unbind()
        shares = {"lm": learned, "token_kl": sequences if self.as_published else distilled}
        return {k: v * shares.get(k, distilled) for k, v in parts.items()}


RELATIVE = Objective()
"""Token KL, and layer terms relative to the teacher's norm: the default."""
TEXT = Objective(token_weight=0.0, layer_weight=0.0, lm_weight=1.0)
"""Without a teacher: the language-model loss of the text itself."""


def text_loss(passage: Passage, head: Head, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the student's language-model loss on a batch's own text, padding left out."""
    assert passage.student_BTD is not None
    labels_BT = inputs["input_ids"].masked_fill(token_weights(inputs) == 0, IGNORED)
    return language_model_loss(passage.student_BTD, head, labels_BT)
