"""NutePruneTrainer: runs the method on top of `transformers.Trainer`; orchestration only.

A step: gates give the masks of the moment, one pass of the backbone plays student and teacher,
distillation losses train LoRA (and log-alpha), snapshots become teachers. At the end: finalize.
`Pruning` decides on the way, `Ending` at its end; here they meet Trainer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from nuteprune.data.blocks import collated
from nuteprune.distill.losses import Head, amplified, batch_counts
from nuteprune.distill.objective import Objective, text_loss
from nuteprune.errors import UserError
from nuteprune.export.wrapping import Around
from nuteprune.train.averaging import around_sharded
from nuteprune.train.bad_steps import clip_lora
from nuteprune.train.calibration import Progress, check_text, silent
from nuteprune.train.checkpoints import AtomicTrainer
from nuteprune.train.checks import check_ascent, check_given
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.finish import Ending
from nuteprune.train.prepare import prepare
from nuteprune.train.pruning import Pruning
from nuteprune.train.publish import PushesCheckpoint
from nuteprune.train.run_settings import run_settings, write_settings
from nuteprune.train.state import RunState


class NutePruneTrainer(PushesCheckpoint, AtomicTrainer):
    """Prunes a causal language model while it learns from less pruned versions of itself.

    Args:
        model: a dense causal LM of a supported family; it is wrapped with LoRA, and `finalize`
            uses it up.
        args: the run's settings.
        train_dataset: items with `input_ids` (T,) of equal length and, where there is padding,
            `attention_mask` (T,).
        processing_class: the tokenizer, saved with the result.
        progress: told about long work outside of training.
        stored_dtype: of the checkpoint that the model is from, which the result keeps; None: the
            model's own.
        job: what else says what the run is (model, data and so on): goes into run/settings.json.
        **kwargs: passed on to `transformers.Trainer`.

    Raises:
        UserError: for an unsupported model, gates that its family cannot take, a target out of the
            gates' reach, or a dataset that is empty or has no length; before anything is changed.
    """

    args: NutePruneConfig
    model: PeftModel

    def __init__(
        self,
        model: PreTrainedModel,
        args: NutePruneConfig,
        train_dataset: Dataset[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        progress: Progress = silent,
        stored_dtype: torch.dtype | None = None,
        job: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        collator = kwargs.pop("data_collator", None) or collated
        if train_dataset is not None:
            check_text(train_dataset, alike=collator is collated)
        check_given(model, kwargs)
        # The layer terms' gradients are too small for float16; what is learned is kept in float32.
        self.loss_scale = 2.0**14 if model.dtype == torch.float16 else 1.0
        self._job = dict(job or {"model": model.config._name_or_path})
        ready = prepare(model, args, stored_dtype)
        self.anatomy, self.hooks, self.coforward = ready.anatomy, ready.hooks, ready.coforward
        self.allocator, self.targets, self.schedule = ready.allocator, ready.targets, ready.schedule
        self.goals, self.prices = ready.goals, ready.prices
        self.gates, self.teachers = ready.gates, ready.teachers
        self.objective: Objective = ready.objective
        self.computed_dtype = ready.origin.computed_dtype
        self.pruning = Pruning(ready, args, lambda: self.train_dataset, progress)
        self.ending = Ending(self.pruning)
        self.parts: dict[str, Tensor | float] = {}
        super().__init__(
            model=ready.model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=[_EndOfStep(self.pruning), *(kwargs.pop("callbacks", None) or [])],
            # Items are of equal length; the default would ask the tokenizer for a padding token.
            data_collator=collator,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        # Trainer leaves models in 8 or 4 bits where they are, and what hangs on them too.
        self.gates.to(self.args.device)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of gates in use."""
        return self.allocator.constraints.kinds

    # -- several processes

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.args.sharded:  # else it is there already
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **more: Any) -> Any:
        """Let DDP average what is trained; accelerate would refuse sharded weights."""
        if not self.args.sharded or not training or isinstance(model, DistributedDataParallel):
            return super()._wrap_model(model, training, *args, **more)
        return around_sharded(model, self.accelerator, self.args.device)

    # -- before the first step

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the steps; see `AtomicTrainer.train`.

        Raises:
            UserError: if the model is used up or trained, or there are no steps or no text.
        """
        self.ending.check_unused()
        if self.pruning.step >= 0 and not resume_from_checkpoint:
            raise UserError(
                "this trainer has trained already: pass resume_from_checkpoint=True to go on, or "
                "make a new one from the dense model"
            )
        if self.args.max_steps == 0:
            raise UserError(
                "max_steps is 0, so there is nothing to train: call finalize() at once, or set "
                "max_steps above 0"
            )
        check_text(self.train_dataset)
        if not self.pruning.warm and not resume_from_checkpoint:
            self.warm_start()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def warm_start(self) -> None:
        """Score all units on calibration text and start the gates from the scores."""
        self.pruning.warm_start()

    def check_optimizer(self) -> None:
        """Make optimizer, schedule and loader once, so that settings fail before a run begins."""
        if self.train_dataset is not None:
            self.get_train_dataloader()
        self.create_optimizer_and_scheduler(max(1, self.args.max_steps))
        self.optimizer = self.lr_scheduler = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with a group for LoRA and, where gates are trained, theirs."""
        if self.optimizer is None:
            lora = [p for n, p in self.model.named_parameters() if "lora_" in n]
            groups = self.gates.parameter_groups()
            given = self.optimizer_cls_and_kwargs
            kind, settings = given or self.get_optimizer_cls_and_kwargs(
                self.args, cast(Any, self.model)
            )
            decay = self.args.weight_decay
            self.optimizer = kind([{"params": lora, "weight_decay": decay}, *groups], **settings)
            check_ascent(groups, self.optimizer)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Make the schedule of LoRA's rate; what is trained of gates has a constant one.

        As in the authors' code: else the multipliers slow down while sparsity still rises.
        """
        made = self.lr_scheduler is None
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if made and isinstance(schedule, LambdaLR):
            own = set(self.gates.parameters())
            for i, group in enumerate(schedule.optimizer.param_groups):
                if own.intersection(group["params"]):
                    schedule.lr_lambdas[i] = lambda _: 1.0
                    group["lr"] = group["initial_lr"]  # the first step's is set already
        return schedule

    # -- a step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Run one micro-batch; the first of a step prepares masks and teacher."""
        before = self.parts if self.state.global_step == self.pruning.step else {}
        self.pruning.begin_step(self.state.global_step)
        with self.student(inputs):
            loss = super().training_step(model, inputs, *args)
        self.gates.observe()
        share = 1 / self.current_gradient_accumulation_steps
        self.parts = {k: before.get(k, 0.0) + share * x for k, x in self.parts.items()}
        return loss

    def student(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Return a context in which the model is the step's student, forward and backward.

        Args:
            inputs: the micro-batch; each of its sequences may have masks of its own.
        """
        return self.coforward.student(self.gates.masks(len(inputs["input_ids"])))

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
        """Return the distillation loss of a micro-batch plus the step's sparsity term.

        It is called within `student`, as its backward pass has to be. Trainer takes the mean
        over micro-batches and processes. Where some have more padding than others, each counts by
        its share of the step's tokens.

        Args:
            model: the model, maybe wrapped.
            inputs: `input_ids` (B, T) and maybe `attention_mask` (B, T).
            return_outputs: not used.
            num_items_in_batch: the step's `batch_counts` (3,); None: all micro-batches are alike.
        """
        assert self.hooks.masks is not None, "without masks the student would be the dense model"
        # Not a local variable: a teacher need not be in memory any more in the backward pass.
        passage = self.coforward.run(model, inputs, self.pruning.read_teacher())
        parts = self.objective.parts(passage, Head.of(self.anatomy), inputs)
        if isinstance(num_items_in_batch, Tensor):
            batches = self.current_gradient_accumulation_steps * self.args.world_size
            parts = self.objective.by_share(parts, inputs, num_items_in_batch / batches)
        penalty = self.gates.penalty()
        if penalty is not None:
            parts["penalty"] = penalty
        self.parts = {name: value.detach() for name, value in parts.items()}
        loss = torch.stack(list(parts.values())).sum()
        return amplified(loss, self.loss_scale)

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """Return the language-model loss of the student as it is now; see `Trainer.evaluate`."""
        inputs = self._prepare_inputs(inputs)
        with self.as_pruned():
            passage = self.coforward.run(model, inputs, teacher=None)
        return text_loss(passage, Head.of(self.anatomy), inputs), None, None

    def as_pruned(self) -> AbstractContextManager[None]:
        """Return a context in which `model` does what would be cut now; outside it has no masks.

        Raises:
            UserError: if the model is used up.
        """
        self.ending.check_unused()
        return self.coforward.student(self.gates.snapshot().to(str(self.args.device)))

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients of LoRA alone, and drop those of a step that is not finite."""
        return clip_lora(model, self.args.max_grad_norm, self.loss_scale, self.pruning.bad_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's figures to the logs, and each step's line to metrics.jsonl.

        Raises:
            RunFailed: after too many steps in a row that were not finite; see `BadSteps.check`.
        """
        if "loss" in logs:
            logs |= {name: float(value) for name, value in self.parts.items()}
            logs |= self.pruning.figures()
            self.write_metrics(logs)
        super().log(logs, start_time)
        self.pruning.bad_steps.check(self.state.global_step, self.args.learning_rate)

    # -- checkpoints of a run

    def settings(self) -> dict[str, Any]:
        """Return what the run is, however its settings were spelled."""
        found = run_settings(self.args, self._job) | {"gates": ",".join(self.kinds)}
        if self.goals[0].asked.kind == "sparsity":
            found["target_sparsity"] = list(self.targets)
        else:
            del found["target_sparsity"]  # a default, which says nothing
        return found

    def run_state(self) -> RunState:
        """Return what the run has learned and decided."""
        return self.pruning.state()

    def take_state(self, state: RunState) -> None:
        """Go back to what a run had learned and decided."""
        self.pruning.take(state)

    # -- after the last step

    def settle(self) -> None:
        """Have scores and final masks, if training has not led to them; all processes take part."""
        if not self.pruning.warm:
            self.warm_start()
        if self.args.max_steps == 0:  # else `train` has written it
            if self.args.should_save:
                write_settings(Path(cast(str, self.args.output_dir)), self.settings())
            self.pruning.pass_targets()
        self.pruning.settle()

    def finalize(
        self, dense: PreTrainedModel | Callable[[], PreTrainedModel] | None = None
    ) -> PreTrainedModel:
        """Freeze, re-fit, merge, fold and slice; uses the trainer's model up.

        Args:
            dense: the model that is cut, loaded anew, its weights whole and as exact as they are
                stored, or a function that loads it when the trainer has made room; it is used up.
                None: the trainer's own.

        Returns:
            The smaller model, of a stock class if its shape allows, else of a subclass of it.

        Raises:
            UserError: if the trainer's own model cannot be cut and no other is given; at a second
                call.
        """
        self.ending.check_unused()
        if dense is None:
            self.ending.check_whole()
        self.settle()
        if self.optimizer is not None:
            self.optimizer.state.clear()  # moments of what is not trained any more
        return self.ending.cut(dense)

    def finalize_target(self, index: int, model: PreTrainedModel) -> PreTrainedModel:
        """Return the smaller model of an earlier target; `save_pruned` writes it from then on.

        Args:
            index: which of the targets, counted from 0.
            model: the dense model, loaded anew; it is used up.
        """
        return self.ending.cut_earlier(index, model)

    def save_pruned(
        self, folder: str | os.PathLike[str], around: Around | None = None, **record: Any
    ) -> dict[str, Any]:
        """Write the finalized model, its tokenizer, record and card.

        Args:
            folder: absent, empty, or with nothing but `run/` in it.
            around: what else the checkpoint has that the model is from; None: nothing.
            **record: what else the record is to hold, such as `perplexity`; `base_model` where it
                is not the folder or hub id that the model was loaded from.

        Returns:
            The record as it was written; parameter counts are those of the written files. The main
            process alone writes: in others it is empty.

        Raises:
            UserError: if nothing was finalized yet, or the folder holds other files.
        """
        if not self.is_world_process_zero():
            return {}
        tokenizer = cast(PreTrainedTokenizerBase | None, self.processing_class)
        written = self.ending.save(Path(folder), tokenizer, record, around)
        self.saved = Path(folder)
        return written


class _EndOfStep(TrainerCallback):
    def __init__(self, pruning: Pruning) -> None:
        self.pruning = pruning

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.pruning.end_step()
