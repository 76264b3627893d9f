"""One backbone, two roles: teacher and student go through the model together, layer by layer.

The student's forward pass is the stock model's own. Hooks on its decoder layers run each layer
once more for the teacher, without gradients, under the teacher's masks and LoRA; the layer's
distillation term is formed at once and the teacher's activations are dropped. So every weight is
read for both roles while it is warm, and attention masks and rotary tables are made once.

Shape suffixes: B batch, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from nuteprune.distill.losses import LayerTerm, token_weights
from nuteprune.gates.masks import Masks, NarrowMasks
from nuteprune.model.anatomy import Anatomy, no_logits
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


class CoForward:
    """Lets a model play student and teacher in one pass.

    Args:
        anatomy: a model wrapped by PEFT.
        hooks: where masks multiply in it.
        bank: its LoRA weights, and weights in place of the base's.
        layer_term: distance of a layer's outputs (student, teacher, weights) -> scalar;
            None: no layer terms.
        normed: whether the last layer's outputs are compared behind the final norm.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        hooks: MaskHooks,
        bank: LoraBank,
        layer_term: LayerTerm | None = None,
        normed: bool = False,
    ) -> None:
        self.anatomy = anatomy
        self.hooks = hooks
        self.bank = bank
        self.layer_term, self.normed = layer_term, normed
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
        passage = Passage()
        handles = [self._on_final_norm(passage, teacher, weight_BT)]
        if teacher is not None:
            theirs = self._source("teacher", teacher.masks)
            first = self.anatomy.layers[0]
            handles.append(first.register_forward_pre_hook(_take_entry(passage), prepend=True))
            for i, layer in enumerate(self.anatomy.layers):
                handles.append(self._on_layer(passage, layer, i, teacher, theirs, weight_BT))
        with ExitStack() as stack:
            for handle in handles:
                stack.enter_context(handle)
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
                theirs_BTD = scale(theirs_BTD, masks.hidden)
            with (
                torch.no_grad(),
                self.hooks.using(masks),
                self.bank.using(index, teacher.lora),
            ):
                # `forward`, not a call: the layer's own hooks must not run for the teacher.
                theirs_BTD = _hidden(layer.forward(theirs_BTD, *args[1:], **kwargs))
            passage._running_BTD = theirs_BTD
            if not (self.normed and index == len(self.anatomy.layers) - 1):
                self._add_term(passage, _hidden(output), theirs_BTD, weight_BT)

        # First of all hooks: FSDP2's lets the layer's weights go.
        return layer.register_forward_hook(hook, with_kwargs=True, prepend=True)

    def _add_term(
        self, passage: Passage, student_BTD: Tensor, teacher_BTD: Tensor, weight_BT: Tensor
    ) -> None:
        if self.layer_term is not None:
            term, total = self.layer_term(student_BTD, teacher_BTD, weight_BT), passage.layer_loss
            passage.layer_loss = term if total is None else total + term
            passage.layers += 1

    def _on_final_norm(self, passage: Passage, teacher: Role | None, weight_BT: Tensor) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            passage.student_BTD = output
            if teacher is not None:
                with torch.no_grad():
                    passage.teacher_BTD = module.forward(passage._running_BTD)
                passage._running_BTD = None
                if self.normed:
                    self._add_term(passage, output, passage.teacher_BTD, weight_BT)

        return self.anatomy.final_norm.register_forward_hook(hook)


def _take_entry(passage: Passage) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        passage._running_BTD = args[0].detach()

    return hook


def _hidden(output: Any) -> Tensor:
    """Return a decoder layer's hidden states, whether it returns them alone or in a tuple."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
