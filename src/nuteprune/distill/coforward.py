"""One backbone, two roles, layer by layer together: teacher and student, and the training loss.

The student's forward pass is the stock model's own. Hooks on its decoder layers run each layer
once more for the teacher, without gradients, under the teacher's masks and LoRA; the layer's
distillation term is formed at once and the teacher's activations are dropped. So every weight is
read for both roles while it is warm, and attention masks and rotary tables are made once.

Shape suffixes: B batch, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.distill.losses import (
    IGNORED,
    Head,
    batch_counts,
    language_model_loss,
    layer_mse,
    layer_relative,
    token_kl,
    token_weights,
)
from nuteprune.gates.masks import Masks, NarrowMasks
from nuteprune.model.anatomy import Anatomy, no_logits
from nuteprune.model.forwards import hidden_of
from nuteprune.model.hooks import MaskHooks, MaskSource, scale
from nuteprune.model.lora import LoraBank, lora_in_base_dtype
from nuteprune.model.weights import is_packed

TEACHERS_MULTIPLE = 128
"""Teachers compute multiples of this many neurons in each layer. Otherwise they have many sizes,
for each of which kernel libraries keep some 0.1 MB."""


@dataclass(frozen=True)
class Role:
    """A role of the backbone: its masks (None: all open) and LoRA weights (None: none)."""

    masks: Masks | None = None
    lora: Mapping[str, Tensor] | None = None


DENSE = Role()
"""The dense model."""


@dataclass
class Passage:
    """The results of a co-forward pass: the sum of layers' terms, and the inputs of both heads."""

    layer_loss: Tensor | None = None
    layers: int = 0
    student_BTD: Tensor | None = None
    teacher_BTD: Tensor | None = None
    _running_BTD: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Objective:
    """The training loss: its terms and their weights.

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
    def layer_distance(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """Distance of a layer's outputs (student, teacher, weights); None without layer terms."""
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


class CoForward:
    """Lets a model play student and teacher in one pass.

    Args:
        anatomy: a model wrapped by PEFT.
        hooks: where masks multiply in it.
        bank: its LoRA weights, and weights in place of the base's.
        objective: what its layers' outputs are compared by.
    """

    def __init__(
        self, anatomy: Anatomy, hooks: MaskHooks, bank: LoraBank, objective: Objective = RELATIVE
    ) -> None:
        self.anatomy, self.hooks, self.bank, self.objective = anatomy, hooks, bank, objective
        self._fixed: dict[str, NarrowMasks] = {}

    def student(self, masks: Masks | None) -> AbstractContextManager[None]:
        """Within this context, the model is the student: in forward and in backward passes.

        The backward pass belongs inside: under activation checkpointing it runs the layers again.

        Args:
            masks: the student's; its LoRA is the model's own.
        """
        return self.hooks.using(self._source("student", masks))

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], teacher: Role | None) -> Passage:
        """Run a batch through the model once, in both roles; see `roles`.

        Args:
            model: the model, maybe wrapped (DDP, FSDP).
            inputs: `input_ids` (B, T) and maybe `attention_mask` (B, T).
            teacher: the teacher, None to run the student alone.
        """
        ids_BT = inputs["input_ids"]
        with (
            self.roles(teacher, token_weights(inputs)) as passage,
            lora_in_base_dtype(self.anatomy),
        ):
            model(
                input_ids=ids_BT,
                attention_mask=inputs.get("attention_mask"),
                use_cache=False,
                logits_to_keep=no_logits(ids_BT),
            )
        return passage

    @contextmanager
    def roles(self, teacher: Role | None, weight_BT: Tensor) -> Iterator[Passage]:
        """Within this context, a call of the model plays both roles, inside of `student`.

        The model is called as usual (through PEFT, DDP or FSDP wrappers too), with
        `use_cache=False`, since both roles would write to one cache, and best with
        `logits_to_keep=no_logits(ids)`, since logits are not needed.

        Args:
            teacher: the teacher, None to run the student alone.
            weight_BT: weight of each token in the layer terms, 0 for padding.
        """
        passage, layers = Passage(), self.anatomy.layers

        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            passage._running_BTD = args[0].detach()

        with ExitStack() as stack:
            stack.enter_context(self._on_final_norm(passage, teacher, weight_BT))
            if teacher is not None:
                theirs = self._source("teacher", teacher.masks)
                stack.enter_context(layers[0].register_forward_pre_hook(enter, prepend=True))
                for i, layer in enumerate(layers):
                    own = self._on_layer(passage, layer, i, teacher, theirs, weight_BT)
                    stack.enter_context(own)
            yield passage

    def _source(self, role: str, masks: Masks | None) -> MaskSource | None:
        """Return masks as hooks read them: narrow if they are fixed."""
        if masks is None or not masks.fixed or is_packed(self.anatomy.model):
            return masks
        fixed = self._fixed.get(role)
        if fixed is None or fixed.masks is not masks:
            multiple = TEACHERS_MULTIPLE if role == "teacher" else 1
            fixed = self._fixed[role] = NarrowMasks(masks, self.anatomy.family, multiple)
        return fixed

    def _on_layer(
        self,
        passage: Passage,
        layer: nn.Module,
        index: int,
        teacher: Role,
        masks: MaskSource | None,
        weight_BT: Tensor,
    ) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            theirs_BTD = passage._running_BTD
            assert theirs_BTD is not None
            if index == 0 and masks is not None:
                theirs_BTD = scale(theirs_BTD, masks.part("hidden", 0))
            with torch.no_grad(), self.hooks.using(masks), self.bank.using(index, teacher.lora):
                # `forward`, not a call: the layer's own hooks must not run for the teacher.
                theirs_BTD = hidden_of(layer.forward(theirs_BTD, *args[1:], **kwargs))
            passage._running_BTD = theirs_BTD
            if not (self.objective.as_published and index == len(self.anatomy.layers) - 1):
                self._add_term(passage, hidden_of(output), theirs_BTD, weight_BT)

        # First of all hooks: FSDP2's lets the layer's weights go.
        return layer.register_forward_hook(hook, with_kwargs=True, prepend=True)

    def _add_term(
        self, passage: Passage, student_BTD: Tensor, teacher_BTD: Tensor, weight_BT: Tensor
    ) -> None:
        if (distance := self.objective.layer_distance) is not None:
            term, total = distance(student_BTD, teacher_BTD, weight_BT), passage.layer_loss
            passage.layer_loss = term if total is None else total + term
            passage.layers += 1

    def _on_final_norm(self, passage: Passage, teacher: Role | None, weight_BT: Tensor) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            passage.student_BTD = output
            if teacher is not None:
                with torch.no_grad():
                    passage.teacher_BTD = module.forward(passage._running_BTD)
                passage._running_BTD = None
                if self.objective.as_published:
                    self._add_term(passage, output, passage.teacher_BTD, weight_BT)

        return self.anatomy.final_norm.register_forward_hook(hook)


def text_loss(passage: Passage, head: Head, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the student's language-model loss on a batch's own text, padding left out."""
    assert passage.student_BTD is not None
    labels_BT = inputs["input_ids"].masked_fill(token_weights(inputs) == 0, IGNORED)
    return language_model_loss(passage.student_BTD, head, labels_BT)
