"""Distiller: trains LoRA by distillation, a step at a time, on top of `transformers.Trainer`.

A step: one pass of the backbone plays student and teacher, and distillation losses train LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, TrainerCallback

from nuteprune.distill.coforward import DENSE, Role
from nuteprune.distill.losses import Head, amplified, batch_counts, unlikelihood
from nuteprune.errors import RunFailed
from nuteprune.gates.masks import Masks
from nuteprune.model.lora import lora_in_base_dtype
from nuteprune.simulated import has_data
from nuteprune.train.checkpoints import AtomicTrainer
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.own_answers import OwnAnswers
from nuteprune.train.prepare import Prepared
from nuteprune.train.state import RunState

MOST_IN_ROW = 3
"""A run stops after so many steps in a row that were not finite, when it next logs."""


class BadSteps:
    """Counts steps that are not finite without waiting for the device; reading a count waits.

    Args:
        device: where gradients are.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts_2 = torch.zeros(2, dtype=torch.long, device=device)

    def read(self) -> list[int]:
        """Return bad steps so far, and those since the last good one."""
        counts: list[int] = self._counts_2.cpu().tolist()
        return counts

    def restore(self, counts: list[int]) -> None:
        """Go back to the counts that a checkpoint knew."""
        self._counts_2.copy_(torch.tensor(counts))

    def drop(self, norm: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Count a step by the norm of its gradients, and set them to 0 if it is not finite.

        The optimizer then goes on by its momentum alone.

        Args:
            norm: total norm of all of them before they were clipped, a scalar.
            parameters: those whose gradients are dropped.
        """
        bad = ~torch.isfinite(norm)
        self._counts_2 += bad
        self._counts_2[1] *= bad
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = torch.where(bad, torch.zeros_like(parameter.grad), parameter.grad)

    def check(self, step: int, learning_rate: float) -> None:
        """Stop a run that does not come back to finite steps.

        Args:
            step: the one that has ended.
            learning_rate: of the settings.

        Raises:
            RunFailed: after `MOST_IN_ROW` steps in a row.
        """
        _, in_row = self.read()
        if in_row >= MOST_IN_ROW:
            raise RunFailed(
                f"the loss or its gradients were not finite in {in_row} steps in a row, up to "
                f"step {step}; lower learning_rate (now {learning_rate}), or use --dtype float32"
            )


class Distiller(AtomicTrainer):
    """Teaches a prepared model, whose masks are fixed here.

    Args:
        prepared: the dense model, prepared.
        args: the run's settings.
        masks: the units to keep; None: they are set before the first step.
        **kwargs: passed on to `AtomicTrainer`.
    """

    args: NutePruneConfig
    model: PeftModel

    def __init__(
        self, prepared: Prepared, args: NutePruneConfig, masks: Masks | None, **kwargs: Any
    ) -> None:
        self.prepared, self.masks = prepared, masks
        self.anatomy, self.coforward = prepared.anatomy, prepared.coforward
        # The layer terms' gradients are too small for float16; what is learned is kept in float32.
        self.loss_scale = 2.0**14 if prepared.origin.computed_dtype == torch.float16 else 1.0
        self.bad_steps = BadSteps(args.device)
        self.parts: dict[str, Tensor | float] = {}
        self._step = -1
        self.answers: OwnAnswers | None = None
        callbacks = [_EndOfStep(self), *(kwargs.pop("callbacks", None) or [])]
        super().__init__(prepared.model, args, callbacks=callbacks, **kwargs)
        self.model_accepts_loss_kwargs = False

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # A sharded one is there already, and one without data is nowhere.
        if not self.args.sharded and has_data(self.anatomy.embedding.weight):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **more: Any) -> Any:
        """Let DDP average what is trained; accelerate would refuse sharded weights."""
        if not self.args.sharded or not training or isinstance(model, DistributedDataParallel):
            return super()._wrap_model(model, training, *args, **more)
        device, handler = self.args.device, self.accelerator.ddp_handler
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        settings: dict[str, Any] = handler.to_kwargs() if handler is not None else {}
        here = None if device.type == "cpu" else [device]
        return DistributedDataParallel(model, device_ids=here, **settings)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups of trained parameters."""
        lora = [p for n, p in self.model.named_parameters() if "lora_" in n]
        return [{"params": lora, "weight_decay": self.args.weight_decay}]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer of the settings with the groups of `parameter_groups`."""
        if self.optimizer is None:
            given = self.optimizer_cls_and_kwargs
            kind, settings = given or self.get_optimizer_cls_and_kwargs(
                self.args, cast(Any, self.model)
            )
            self.optimizer = kind(self.parameter_groups(), **settings)
        return self.optimizer

    # -- a step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Run one micro-batch; the first of a step prepares the step."""
        step = self.state.global_step
        before = self.parts if step == self._step else {}
        if step != self._step:
            self._step = step
            self.begin_step(step)
            if self.answers is not None and self.answers.due(step):
                with self.answering() as student:
                    self.answers.write(student, step, self.prepared.team)
        with self.student(inputs):
            loss = super().training_step(model, inputs, *args)
            if self.answers is not None and self.answers.read_in(step):
                self._unlearn(model, self.answers)
        share = 1 / self.current_gradient_accumulation_steps
        self.parts = {k: before.get(k, 0.0) + share * x for k, x in self.parts.items()}
        return loss

    def _unlearn(self, model: nn.Module, answers: OwnAnswers) -> None:
        """Add the gradients by which repeats in the student's answers get less likely."""
        ids_BT, repeats_BT = answers.next_blocks(self.args)
        if not len(ids_BT):  # nothing repeats
            return
        with self.compute_loss_context_manager():
            passage = self.coforward.run(model, {"input_ids": ids_BT}, teacher=None)
            assert passage.student_BTD is not None
            head, weight = Head.of(self.anatomy), self.args.unlikelihood
            loss = weight * unlikelihood(passage.student_BTD, head, ids_BT, repeats_BT)
        share = 1 / self.current_gradient_accumulation_steps
        (share * amplified(loss, self.loss_scale)).backward()
        self.parts["repeats"] = loss.detach()

    @contextmanager
    def answering(self) -> Iterator[PreTrainedModel]:
        """Within this context, the model that is yielded writes as the student."""
        with self.coforward.student(self.masks), lora_in_base_dtype(self.anatomy):
            yield self.anatomy.model

    def begin_step(self, step: int) -> None:
        """Prepare an optimizer step; masks are fixed, so there is nothing to prepare."""

    def end_step(self) -> None:
        """Finish an optimizer step."""

    def student(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Return a context in which the model is the step's student, forward and backward."""
        return self.coforward.student(self.masks)

    def teacher(self) -> Role | None:
        """Return the step's teacher; None without any."""
        return None if self.args.teacher == "none" else DENSE

    def penalty(self) -> Tensor | None:
        """Return a further term of the loss, None without any."""
        return None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Return a step's `batch_counts` (3,), of all processes; None where its parts are alike."""
        padded = any("attention_mask" in batch for batch in batch_samples)
        alike = not padded and len({batch["input_ids"].shape for batch in batch_samples}) <= 1
        if self.args.world_size == 1 and alike:  # of several processes all have to answer
            return None
        counts_3 = torch.stack([batch_counts(batch) for batch in batch_samples]).sum(0).to(device)
        return self.accelerator.reduce(counts_3, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the distillation loss of a micro-batch.

        It is called within `student`, as its backward pass has to be. Trainer takes the mean
        over micro-batches and processes. Where some have more padding than others, each counts by
        its share of the step's tokens.

        Args:
            model: the model, maybe wrapped.
            inputs: `input_ids` (B, T) and maybe `attention_mask` (B, T).
            return_outputs: not used.
            num_items_in_batch: the step's `batch_counts` (3,); None: all micro-batches are alike.
        """
        assert self.prepared.hooks.masks is not None, "without masks the student is the dense model"
        objective = self.args.losses
        # Not a local variable: a teacher need not be in memory any more in the backward pass.
        passage = self.coforward.run(model, inputs, self.teacher())
        parts = objective.parts(passage, Head.of(self.anatomy), inputs)
        if isinstance(num_items_in_batch, Tensor):
            batches = self.current_gradient_accumulation_steps * self.args.world_size
            parts = objective.by_share(parts, inputs, num_items_in_batch / batches)
        if (penalty := self.penalty()) is not None:
            parts["penalty"] = penalty
        self.parts = {name: value.detach() for name, value in parts.items()}
        loss = torch.stack(list(parts.values())).sum()
        return amplified(loss, self.loss_scale)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients of LoRA alone, and drop those of a step that is not finite."""
        trained = [p for p in model.parameters() if p.grad is not None]
        if self.loss_scale != 1:
            torch._foreach_div_([cast(Tensor, p.grad) for p in trained], self.loss_scale)
        lora = [p for n, p in model.named_parameters() if "lora_" in n and p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in lora if p.grad is not None])
        total = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(lora, self.args.max_grad_norm, norm)
        self.bad_steps.drop(total, trained)
        return norm

    # -- what is logged, and what checkpoints hold

    def figures(self) -> dict[str, float]:
        """Return the method's figures for a step's line in the logs."""
        return {"sparsity": self.sparsity(), "bad_steps": self.bad_steps.read()[0]}

    def manner(self) -> str:
        """Return a line that describes the training, printed before it begins."""
        return ""

    def sparsity(self) -> float:
        """Return the sparsity of the step's masks."""
        assert self.masks is not None
        return self.prepared.allocator.sparsity(self.masks)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to the logs; see `AtomicTrainer.log`.

        Raises:
            RunFailed: after too many steps in a row that were not finite; see `BadSteps.check`.
        """
        if "loss" in logs:
            logs |= {name: float(value) for name, value in self.parts.items()}
        super().log(logs, start_time)
        self.bad_steps.check(self.state.global_step, cast(float, self.args.learning_rate))

    def run_state(self) -> RunState:
        """Return the trained weights; masks and refitted weights are products of the run."""
        tensors = {"lora": self.prepared.bank.lora()}
        if self.answers is not None:
            tensors["answers"] = self.answers.tensors()
        return RunState(tensors, {"bad_steps": self.bad_steps.read()})

    def take_state(self, state: RunState) -> None:
        """Go back to a state that `run_state` returned."""
        self.prepared.bank.load_lora(state.lora)
        self.bad_steps.restore(state.notes["bad_steps"])
        if self.answers is not None:
            self.answers.restore(state.tensors.get("answers", {}))
        self._step = -1


class _EndOfStep(TrainerCallback):
    def __init__(self, trainer: Distiller) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.end_step()
