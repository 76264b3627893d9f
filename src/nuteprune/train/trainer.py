"""NutePruneTrainer: runs the method on top of `transformers.Trainer`; orchestration only.

A step: gates give the masks of the moment, one pass of the backbone plays student and teacher,
distillation losses train LoRA (and log-alpha), snapshots become teachers. At the end: finalize.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_utils import set_seed

from nuteprune.distill.coforward import CoForward
from nuteprune.distill.losses import Head, amplified, token_counts
from nuteprune.distill.objective import OBJECTIVES, TEXT, Objective, text_loss
from nuteprune.distill.teachers import Plan, Role, Teachers
from nuteprune.errors import RunFailed, UserError
from nuteprune.export.checkpoint import as_stored
from nuteprune.export.loading import exact_dtype
from nuteprune.export.record import origin_of, read_record, write_pruned
from nuteprune.gates.gate_types import GATE_TYPES
from nuteprune.gates.gates import Gates
from nuteprune.gates.masks import Masks
from nuteprune.gates.schedule import Schedule
from nuteprune.model.anatomy import Anatomy, silence_dropout
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.packed import is_packed, make_trainable
from nuteprune.model.sharding import all_processes, shard_base
from nuteprune.processes import agree
from nuteprune.run_folder import RECORD, TEACHERS
from nuteprune.shrink.compensate import install_in_place, install_lora
from nuteprune.train.bad_steps import MOST_IN_ROW, BadSteps
from nuteprune.train.calibration import Progress, check_text, refit_on, score_on, silent
from nuteprune.train.checkpoints import AtomicTrainer
from nuteprune.train.checks import check_checkpointing, check_shards, check_whole
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.finish import Finished, finish, free_base, with_lora
from nuteprune.train.publish import PushesCheckpoint
from nuteprune.train.run_settings import chosen_settings, run_settings, write_settings
from nuteprune.train.setup import (
    check_stock,
    lora_config,
    make_allocator,
    make_gates,
    run_targets,
)
from nuteprune.train.state import RunState, restore


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
        check_whole(args)
        check_shards(args.sharded, args.world_size, is_packed(model))
        check_checkpointing(model, args)
        if train_dataset is not None:
            check_text(train_dataset)
        if kwargs.get("compute_metrics"):
            raise UserError(
                "compute_metrics needs logits, which are never held: leave it out; eval_loss, the "
                "language-model loss, is there"
            )
        make_trainable(model)
        dense = Anatomy(model)
        self._total_before = dense.parameters()
        name = model.config._name_or_path
        pruned_before = bool(name) and (Path(name) / RECORD).is_file()
        self._origin = origin_of(name or None, read_record(Path(name)) if pruned_before else None)
        self.stored_dtype: torch.dtype = stored_dtype or model.dtype
        self.computed_dtype: torch.dtype = dense.embedding.weight.dtype
        self.allocator = make_allocator(dense, args)
        # Fails early, before the model is touched, if a target is out of reach.
        self.targets = run_targets(self.allocator, args)
        check_stock(dense, self.allocator, self.targets[-1])
        self.progress = progress
        model.requires_grad_(False)
        silence_dropout(model)
        set_seed(args.seed)  # LoRA starts from random values
        peft_model = get_peft_model(model, lora_config(dense, args))
        self.anatomy = Anatomy(peft_model)
        self.hooks = MaskHooks(self.anatomy)
        self.objective: Objective = TEXT if args.teachers == "none" else OBJECTIVES[args.objective]
        self.coforward = CoForward(self.anatomy, self.hooks, self.objective.layer_distance)
        ramp, freeze = args.shares
        self.schedule = Schedule(self.targets, args.max_steps, ramp, freeze)
        ramps = self.schedule.stage(0).ramp_steps * len(self.targets)
        self.plan = Plan.for_target(self.targets[-1], ramps, args.teachers)
        run = Path(cast(str, args.output_dir))
        keep = args.device.type != "cpu"
        self.teachers = Teachers(run / TEACHERS, self.allocator.layout, keep)
        self.reached: list[int] = []
        self.gates: Gates = make_gates(self.allocator, self.allocator.equal_scores(), args)
        peft_model.add_module("nuteprune_gates", self.gates)
        if args.sharded:
            shard_base(self.anatomy, all_processes(args.device))
        # The penalty, alike on all processes, is no part of the forward pass that DDP looks at;
        # sharded weights are none of its business.
        peft_model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            name
            for name, p in peft_model.named_parameters()
            if ".lagrangian." in name or (args.sharded and not p.requires_grad)
        ]
        # The layer terms' gradients are too small for float16; what is learned is kept in float32.
        self.loss_scale = 2.0**14 if model.dtype == torch.float16 else 1.0
        self._job = dict(job or {"model": model.config._name_or_path})
        self._warm = self._used_up = False
        self.first_scores: dict[str, Tensor] = {}
        self.finished: Finished | None = None
        self._step = -1
        self.teacher_index = -1
        self.parts: dict[str, Tensor | float] = {}
        super().__init__(
            model=peft_model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=[_EndOfStep(self), *kwargs.pop("callbacks", [])],
            # Items are of equal length; the default would ask the tokenizer for a padding token.
            data_collator=kwargs.pop("data_collator", default_data_collator),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        # Trainer leaves models in 8 or 4 bits where they are, and what hangs on them too.
        self.gates.to(self.args.device)
        self.bad_steps = BadSteps(self.args.device)

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
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        handler = self.accelerator.ddp_handler
        settings = handler.to_kwargs() if handler is not None else {}
        here = None if self.args.device.type == "cpu" else [self.args.device]
        return DistributedDataParallel(model, device_ids=here, **settings)

    # -- before the first step

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the steps; see `AtomicTrainer.train`."""
        self._check_unused()
        if self.args.max_steps == 0:
            raise UserError(
                "max_steps is 0, so there is nothing to train: call finalize() at once, or set "
                "max_steps above 0"
            )
        check_text(self.train_dataset)
        if not self._warm and not resume_from_checkpoint:
            self.warm_start()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def warm_start(self) -> None:
        """Score all units on calibration text and start the gates from the scores."""
        if GATE_TYPES[self.args.gate_type].ranked:
            scores = score_on(
                self.train_dataset,
                self.args,
                self.anatomy,
                self.hooks,
                self.allocator,
                self.progress,
            )
            fresh = make_gates(self.allocator, scores, self.args)
            self.gates.load_state_dict(fresh.state_dict())
            agree(self.gates.state_dict().values())
        self.first_scores = {k: v.cpu().clone() for k, v in self.gates.scores.items()}
        self._warm = True

    def check_optimizer(self) -> None:
        """Make the optimizer and its schedule once, so that settings fail before a run begins."""
        self.create_optimizer_and_scheduler(max(1, self.args.max_steps))
        self.optimizer = self.lr_scheduler = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with a group for LoRA and, where gates are trained, theirs."""
        if self.optimizer is None:
            lora = [p for n, p in self.model.named_parameters() if "lora_" in n]
            groups = self.gates.parameter_groups()
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, self.model))
            decay = self.args.weight_decay
            self.optimizer = kind([{"params": lora, "weight_decay": decay}, *groups], **settings)
        return self.optimizer

    # -- a step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Run one micro-batch; the first of a step prepares masks and teacher."""
        if self._step != self.state.global_step:
            self._step = self.state.global_step
            self._begin_step(self._step)
        with self.student(inputs):
            loss = super().training_step(model, inputs, *args)
        self.gates.observe()
        return loss

    def student(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Return a context in which the model is the step's student, forward and backward.

        Args:
            inputs: the micro-batch; each of its sequences may have masks of its own.
        """
        return self.coforward.student(self.gates.masks(len(inputs["input_ids"])))

    def _begin_step(self, step: int) -> None:
        stage = self.schedule.stage(step)
        if step == stage.first or step < stage.freeze_step:
            self.gates.thaw()
        if step >= stage.freeze_step and not self.gates.frozen:
            self.freeze(stage.target)
        seed = (self.args.seed * 1_000_003 + step) % 2**32  # of more bits torch uses the last 32
        self.gates.begin_step(self.schedule.sparsity(step), seed)
        self.teacher_index = self.plan.teacher(stage, step, len(self.teachers))

    def _read_teacher(self) -> Role | None:
        """Return the step's teacher, on the run's device and in its dtype; None without any."""
        if self.plan.kind == "none":
            return None
        dtype = self.anatomy.embedding.weight.dtype
        return self.teachers.role(self.teacher_index, str(self.args.device), dtype)

    def end_step(self) -> None:
        """Finish an optimizer step: scores follow, and a snapshot is taken where one is due."""
        self.gates.end_step()
        stage = self.schedule.stage(self._step)
        at_target = self._step + 1 == stage.end and stage.target < self.targets[-1]
        if at_target and not self.gates.frozen:
            self.freeze(stage.target)
        sparsity = self.gates.sparsity()
        moving = not self.gates.frozen
        if at_target:
            self._record_target()
        elif moving and self.plan.due(sparsity, self.teachers.newest):
            self._record_teacher(torch.bfloat16)

    def _record_target(self) -> None:
        """Keep the model of a target that is reached: nothing of what is written is rounded."""
        self.reached.append(len(self.teachers))
        self._record_teacher(torch.float32)

    def _record_teacher(self, dtype: torch.dtype) -> None:
        masks, lora = self.gates.snapshot(), self.coforward.bank.state()
        self.teachers.record(self.gates.sparsity(), masks, lora, dtype)

    def freeze(self, target: float) -> None:
        """Fix the masks, and re-fit the weights that stay where that is asked for."""
        masks = self.gates.freeze(target)
        if self.args.compensation:
            bank, anatomy, args = self.coforward.bank, self.anatomy, self.args
            install = install_in_place(bank, anatomy)
            if args.sharded or is_packed(anatomy.model):  # no place for whole weights there
                install = install_lora(bank, anatomy, args.lora_rank)
            text, tell, dense = self.train_dataset, self.progress, bank.dense
            refit_on(text, args, anatomy, self.hooks, masks, install, tell, dense)
            agree(bank.state().values())

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the tokens (2,) of a step, of all processes; None where one knows of no padding."""
        padded = any("attention_mask" in batch for batch in batch_samples)
        if self.args.world_size == 1 and not padded:  # of several processes all have to answer
            return None
        counts_2 = torch.stack([token_counts(batch) for batch in batch_samples]).sum(0).to(device)
        return self.accelerator.reduce(counts_2, "sum")

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
            num_items_in_batch: the step's `token_counts` (2,); None: all micro-batches are alike.
        """
        assert self.hooks.masks is not None, "without masks the student would be the dense model"
        # Not a local variable: a teacher need not be in memory any more in the backward pass.
        passage = self.coforward.run(model, inputs, self._read_teacher())
        parts = self.objective.parts(passage, Head.of(self.anatomy), inputs)
        if isinstance(num_items_in_batch, Tensor):
            mean_2 = num_items_in_batch / (
                self.current_gradient_accumulation_steps * self.args.world_size
            )
            distilled, learned = (token_counts(inputs) / mean_2).unbind()
            parts = {k: v * (learned if k == "lm" else distilled) for k, v in parts.items()}
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
        self._check_unused()
        inputs = self._prepare_inputs(inputs)
        masks = self.gates.snapshot().to(str(self.args.device))
        with self.coforward.student(masks):
            passage = self.coforward.run(model, inputs, teacher=None)
        return text_loss(passage, Head.of(self.anatomy), inputs), None, None

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's figures to the logs, and each step's line to metrics.jsonl.

        Raises:
            RunFailed: after `MOST_IN_ROW` steps in a row that were not finite.
        """
        if "loss" in logs:
            logs |= {name: float(value) for name, value in self.parts.items()}
            logs |= self.gates.figures()
            logs |= {
                "sparsity": self.gates.sparsity(),
                "target": self.schedule.sparsity(self._step),
                "teacher": self.teacher_index,
                "teachers": len(self.teachers),
                "bad_steps": self.bad_steps.total,
            }
            self.write_metrics(logs)
        super().log(logs, start_time)
        if self.bad_steps.in_row >= MOST_IN_ROW:
            raise RunFailed(
                f"the loss or its gradients were not finite in {self.bad_steps.in_row} steps in a "
                f"row, up to step {self.state.global_step}; lower learning_rate (now "
                f"{self.args.learning_rate}), or use --dtype float32"
            )

    # -- checkpoints of a run

    def settings(self) -> dict[str, Any]:
        """Return what the run is, however its settings were spelled."""
        spelled: dict[str, Any] = {"gates": ",".join(self.kinds)}
        if self.args.shape is None:
            spelled["target_sparsity"] = list(self.targets)
        return {**run_settings(self.args, self._job), **spelled}

    def run_state(self) -> RunState:
        """Return what the run has learned and decided."""
        return RunState(
            lora=self.coforward.bank.state(),
            gates=self.gates.state_dict(),
            masks=self.gates.snapshot().values,
            frozen=self.gates.frozen,
            first_scores=self.first_scores,
            teachers=self.teachers.sparsities,
            sums=self.teachers.sums,
            reached=self.reached,
            bad_steps=[self.bad_steps.total, self.bad_steps.in_row],
        )

    def take_state(self, state: RunState) -> None:
        """Go back to what a run had learned and decided."""
        self.coforward.bank.load(state.lora)
        restore(self.gates.state_dict(), state.gates, "gates")
        if state.frozen:
            self.gates.restore_masks(Masks(self.allocator.layout, state.masks))
        self.teachers.restore(state.teachers, state.sums)
        self.reached, self.first_scores = state.reached, state.first_scores
        self.bad_steps.restore(*state.bad_steps)
        self._warm = True

    # -- after the last step

    def settle(self) -> None:
        """Have scores and final masks, if training has not led to them; all processes take part."""
        if not self._warm:
            self.warm_start()
        if self.args.max_steps == 0:  # else `train` has written it
            if self.args.should_save:
                write_settings(Path(cast(str, self.args.output_dir)), self.settings())
            for target in self.targets[len(self.reached) : -1]:
                self.freeze(target)
                self._record_target()
                self.gates.thaw()
                self.coforward.bank.clear()
        if not self.gates.frozen:
            self.freeze(self.targets[-1])

    @property
    def reloads(self) -> bool:
        """Whether the model that is cut has to be loaded anew.

        So it is where the trainer's own is not whole, or does not hold all values that are stored.
        """
        own = self.computed_dtype
        narrow = exact_dtype(self.stored_dtype, own) != own
        return self.args.sharded or is_packed(self.anatomy.model) or narrow

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
        self._check_unused()
        if dense is None and self.reloads:
            raise UserError(
                "weights that are sharded, in 8 or 4 bits, or narrower than they are stored cannot "
                "be cut: load the model again, whole and in full precision, and call "
                "finalize(dense=...) in one process"
            )
        self.settle()
        self.hooks.remove()
        self._used_up = True
        model = self.model
        if dense is not None:
            learned = self.coforward.bank.state()
            self.coforward.bank.release()
            free_base(model)
            dense = dense if isinstance(dense, PreTrainedModel) else dense()
            model = with_lora(dense, learned, self.args, self.computed_dtype)
        return self._finish(model, self.gates.snapshot(), self.targets[-1])

    def _check_unused(self) -> None:
        if self._used_up:
            raise UserError(
                "finalize() has used the trainer's model up, and what was learned with it: keep "
                "what it returned. To go on from a checkpoint of the run, make a new trainer and "
                "call train(resume_from_checkpoint=True)"
            )

    def finalize_target(self, index: int, model: PreTrainedModel) -> PreTrainedModel:
        """Return the smaller model of an earlier target; `save_pruned` writes it from then on.

        Args:
            index: which of the targets, counted from 0.
            model: the dense model, loaded anew; it is used up.
        """
        role = self.teachers.role(self.reached[index])
        assert role.masks is not None
        assert role.lora is not None
        peft_model = with_lora(model, role.lora, self.args, self.computed_dtype)
        return self._finish(peft_model, role.masks, self.targets[index])

    def _finish(self, model: PeftModel, masks: Masks, target: float) -> PreTrainedModel:
        self.finished = finish(model, masks, target, self.stored_dtype)
        return self.finished.model

    def save_pruned(self, folder: str | os.PathLike[str], **record: Any) -> dict[str, Any]:
        """Write the finalized model, its tokenizer, record and card.

        Args:
            folder: absent, empty, or with nothing but `run/` in it.
            **record: what else the record is to hold, such as `perplexity`; `base_model` where it
                is not the folder or hub id that the model was loaded from.

        Returns:
            The record as it was written; parameter counts are those of the written files.

        Raises:
            UserError: if nothing was finalized yet, or the folder holds other files.
        """
        done = self.finished
        if done is None:
            raise UserError("there is nothing to save yet: call finalize() first")
        tokenizer = cast(PreTrainedTokenizerBase | None, self.processing_class)
        budget = self.allocator.budget
        record = {**self._origin, "config": chosen_settings(self.args), **record}
        record.setdefault("perplexity", {"before": {}, "after": {}})
        written = write_pruned(
            Path(folder),
            as_stored(done.model, self.stored_dtype),
            tokenizer,
            params={"before": self._total_before, "blocks_before": budget.before},
            target=done.target,
            before=budget.shape,
            after=done.shape,
            shapes=self.args.shapes,
            teachers={"count": len(self.teachers), "sparsities": self.teachers.sparsities},
            bad_steps=self.bad_steps.total,
            seed=self.args.seed,
            **record,
        )
        self.saved = Path(folder)
        return written


class _EndOfStep(TrainerCallback):
    def __init__(self, trainer: NutePruneTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.end_step()
