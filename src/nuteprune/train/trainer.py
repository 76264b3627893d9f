"""NutePruneTrainer: teaches a model whose masks are fixed, on top of `transformers.Trainer`.

A step: one pass of the backbone plays student and teacher, and distillation losses train LoRA. The
trainer is given masks and refitted weights, or calls the stages that make them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from nuteprune.console import Progress, silent
from nuteprune.data.blocks import collated
from nuteprune.data.calibration import check_text
from nuteprune.distill.coforward import DENSE, Role
from nuteprune.distill.losses import Head, amplified, batch_counts
from nuteprune.distill.objective import text_loss
from nuteprune.errors import UserError
from nuteprune.gates.masks import Masks
from nuteprune.model.lora import Learned, Weights
from nuteprune.model.offload import bring_home
from nuteprune.products import Products
from nuteprune.simulated import has_data
from nuteprune.stages.save import save
from nuteprune.stages.slice import Sliced, slice_model
from nuteprune.train.averaging import around_sharded
from nuteprune.train.bad_steps import BadSteps, clip_lora
from nuteprune.train.checkpoints import AtomicTrainer
from nuteprune.train.checks import check_given
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.cut import Cut
from nuteprune.train.prepare import Prepared, prepare
from nuteprune.train.publish import PushesCheckpoint
from nuteprune.train.run_settings import chosen_settings, run_settings, write_settings
from nuteprune.train.state import RunState
from nuteprune.train.targets import Target

if TYPE_CHECKING:
    from nuteprune.export.wrapping import Around


class NutePruneTrainer(PushesCheckpoint, AtomicTrainer):
    """Distils the dense model into the cut one.

    Args:
        model: a dense causal LM of a supported family, which is wrapped with LoRA, or one that is
            prepared; `finalize` uses it up.
        args: the run's settings.
        train_dataset: items with `input_ids` (T,) of equal length and, where there is padding,
            `attention_mask` (T,).
        processing_class: the tokenizer, saved with the result.
        masks: the units to keep; None: the stages decide.
        weights: what `refit` returned for these masks.
        goal: which of the model's goals they are for; None: the last one.
        products: where the stages leave what they make; None: in the run's folder.
        progress: told about long work outside of training.
        stored_dtype: of the checkpoint that the model is from, which the result keeps; None: the
            model's own.
        job: the job's settings (model, data and so on), which go into run/settings.json too.
        **kwargs: passed on to `transformers.Trainer`.

    Raises:
        UserError: for an unsupported model, gates that its family cannot take, a target out of the
            gates' reach, or a dataset that is empty or has no length; before anything is changed.
    """

    args: NutePruneConfig
    model: PeftModel

    def __init__(
        self,
        model: PreTrainedModel | Prepared,
        args: NutePruneConfig,
        train_dataset: Dataset[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        masks: Masks | None = None,
        weights: Weights | None = None,
        goal: Target | None = None,
        products: Products | None = None,
        progress: Progress = silent,
        stored_dtype: torch.dtype | None = None,
        job: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        collator = kwargs.pop("data_collator", None) or collated
        if train_dataset is not None:
            check_text(train_dataset, alike=collator is collated)
        if isinstance(model, PreTrainedModel):
            check_given(model, kwargs)
            model = prepare(model, args, stored_dtype)
        self.ready, self.goal = model, goal or model.goals[-1]
        self.masks, self.weights, self._products = masks, weights, products
        self.anatomy, self.coforward = model.anatomy, model.coforward
        # The layer terms' gradients are too small for float16; what is learned is kept in float32.
        self.loss_scale = 2.0**14 if model.origin.computed_dtype == torch.float16 else 1.0
        self.bad_steps = BadSteps(args.device)
        self.parts: dict[str, Tensor | float] = {}
        self.sliced: Sliced | None = None
        self._job = dict(job or {"model": model.anatomy.config._name_or_path})
        self._progress, self._used_up, self._step = progress, False, -1
        super().__init__(
            model=model.model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=[_EndOfStep(self), *(kwargs.pop("callbacks", None) or [])],
            # Items are of equal length; the default would ask the tokenizer for a padding token.
            data_collator=collator,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False

    # -- several processes

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # A sharded one is there already, and one without data is nowhere.
        if not self.args.sharded and has_data(self.anatomy.embedding.weight):
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
        self.check_unused()
        if self._step >= 0 and not resume_from_checkpoint:
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
        self.begin(resumes=bool(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def begin(self, resumes: bool = False) -> None:
        """Get masks and weights, and put the weights into the model; all processes take part.

        Args:
            resumes: whether to use the products of an earlier run in the folder.
        """
        if self.masks is None:
            cut = self.stages_before(resumes)
            scores = cut.price(cut.score())
            self.masks = cut.choose(scores, self.goal)
            self.weights = cut.refit(self.masks, self.goal)
        if self.weights is not None:
            self.ready.bank.install(self.weights)
            self.weights = None

    def stages_before(self, resumes: bool) -> Cut:
        """Return the stages before the first step; see `begin`."""
        products = self._products or Products(self.run_folder, self.settings(), resumes)
        return Cut(self.ready, self.args, self.train_dataset, products, self._progress)

    @property
    def run_folder(self) -> Path:
        """Where the run's files are."""
        return Path(cast(str, self.args.output_dir))

    def check_optimizer(self) -> None:
        """Make optimizer, schedule and loader once, so that settings fail before a run begins."""
        if self.train_dataset is not None:
            self.get_train_dataloader()
        self.create_optimizer_and_scheduler(max(1, self.args.max_steps))
        self.optimizer = self.lr_scheduler = None

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
        with self.student(inputs):
            loss = super().training_step(model, inputs, *args)
        share = 1 / self.current_gradient_accumulation_steps
        self.parts = {k: before.get(k, 0.0) + share * x for k, x in self.parts.items()}
        return loss

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
        assert self.ready.hooks.masks is not None, "without masks the student is the dense model"
        objective = self.ready.objective
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
        """Return a context in which `model` uses the current masks; outside of it, none.

        Raises:
            UserError: if the model is used up.
        """
        self.check_unused()
        return self.coforward.student(self.masks)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients of LoRA alone, and drop those of a step that is not finite."""
        return clip_lora(model, self.args.max_grad_norm, self.loss_scale, self.bad_steps)

    def figures(self) -> dict[str, float]:
        """Return the method's figures for a step's line in the logs."""
        return {"sparsity": self.sparsity(), "bad_steps": self.bad_steps.total}

    def manner(self) -> str:
        """Return a line that describes the training, printed before it begins."""
        return ""

    def note(self, logs: Mapping[str, Any]) -> str:
        """Return the note to show beside the progress bar, from a step's logs."""
        return f"loss {logs['loss']:.3f}"

    def sparsity(self) -> float:
        """Return the sparsity of the step's masks."""
        assert self.masks is not None
        return self.ready.allocator.sparsity(self.masks)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's figures to the logs, and each step's line to metrics.jsonl.

        Raises:
            RunFailed: after too many steps in a row that were not finite; see `BadSteps.check`.
        """
        if "loss" in logs:
            logs |= {name: float(value) for name, value in self.parts.items()}
            logs |= self.figures()
            self.write_metrics(logs)
        super().log(logs, start_time)
        self.bad_steps.check(self.state.global_step, cast(float, self.args.learning_rate))

    # -- checkpoints of a run

    def settings(self) -> dict[str, Any]:
        """Return the run's settings in their canonical spelling."""
        found = run_settings(self.args, self._job) | {"gates": ",".join(self.ready.kinds)}
        goals = self.ready.goals
        if goals[0].asked.kind == "sparsity":
            found["target_sparsity"] = [goal.sparsity for goal in goals]
        else:
            del found["target_sparsity"]  # a default, which says nothing
        return found

    def run_state(self) -> RunState:
        """Return the trained weights; masks and refitted weights are products of the run."""
        lora = {k: v for k, v in self.ready.bank.state().items() if not k.endswith(".W")}
        return RunState({"lora": lora}, {"bad_steps": self._bad_steps()})

    def _bad_steps(self) -> list[int]:
        return [self.bad_steps.total, self.bad_steps.in_row]

    def take_state(self, state: RunState) -> None:
        """Go back to a state that `run_state` returned."""
        self.ready.bank.load_lora(state.lora)
        self.bad_steps.restore(*state.notes["bad_steps"])
        self._step = -1

    # -- after the last step

    def check_unused(self) -> None:
        """Refuse a model that `finalize` has already taken apart.

        Raises:
            UserError: if it is.
        """
        if self._used_up:
            raise UserError(
                "finalize() has used the trainer's model up, and what was learned with it: keep "
                "what it returned. To go on from a checkpoint of the run, make a new trainer and "
                "call train(resume_from_checkpoint=True)"
            )

    def settle(self) -> None:
        """Choose final masks if training has not; all processes take part."""
        self.begin()
        if self.args.max_steps == 0 and self.args.should_save:  # else `train` has written it
            write_settings(self.run_folder, self.settings())

    def finalize(
        self, dense: PreTrainedModel | Callable[[], PreTrainedModel] | None = None
    ) -> PreTrainedModel:
        """Merge, fold and slice; uses the trainer's model up.

        Args:
            dense: the dense model, loaded anew with whole weights in their stored dtype, or a
                function that loads it once the trainer has freed its own. It is used up.
                None: the trainer's own.

        Returns:
            The smaller model, of a stock class if its shape allows, else of a subclass of it.

        Raises:
            UserError: if the trainer's own model cannot be cut and no other is given; at a second
                call.
        """
        self.check_unused()
        if dense is None:
            self.ready.check_can_be_cut()
        self.settle()
        if self.optimizer is not None:
            self.optimizer.state.clear()  # moments of what is not trained any more
        learned = self.ready.bank.learned()
        self._used_up = True
        if dense is None:
            base = self.ready.unwrapped()
            if self.args.offload:
                bring_home(base)
        else:
            self.ready.free()
            base = dense if isinstance(dense, PreTrainedModel) else dense()
        return self._cut(base, learned)

    def cut_copy(self, dense: PreTrainedModel) -> PreTrainedModel:
        """Return the smaller model, cut from the dense model loaded anew.

        Args:
            dense: see `finalize`.
        """
        self.settle()
        return self._cut(dense, self.ready.bank.learned())

    def _cut(self, base: PreTrainedModel, learned: Learned) -> PreTrainedModel:
        origin = self.ready.origin
        self.sliced = slice_model(
            base,
            self.final_masks(),
            learned,
            computed_dtype=origin.computed_dtype,
            stored_dtype=origin.stored_dtype,
            folder=self.run_folder,
        )
        return self.sliced.model

    def final_masks(self) -> Masks:
        """Return the masks that the model is cut by."""
        assert self.masks is not None
        return self.masks

    def save_pruned(
        self, folder: str | os.PathLike[str], around: Around | None = None, **record: Any
    ) -> dict[str, Any]:
        """Write the finalized model, its tokenizer, record and card.

        Args:
            folder: absent, empty, or with nothing but `run/` in it.
            around: the other parts of the source checkpoint; None: there are none.
            **record: further keys of the record, such as `perplexity`; `base_model` where it
                is not the folder or hub id that the model was loaded from.

        Returns:
            The record as it was written; parameter counts are those of the written files. The main
            process alone writes: in others it is empty.

        Raises:
            UserError: if nothing was finalized yet, or the folder holds other files.
        """
        if not self.is_world_process_zero():
            return {}
        if self.sliced is None:
            raise UserError("there is nothing to save yet: call finalize() first")
        tokenizer = cast(PreTrainedTokenizerBase | None, self.processing_class)
        about = {**self.about(self.sliced), **record}
        written = save(self.sliced, Path(folder), tokenizer, around=around, **about)
        self.saved = Path(folder)
        return written

    def about(self, sliced: Sliced) -> dict[str, Any]:
        """Return the run's arguments for `stages.save`."""
        ready, origin, shape = self.ready, self.ready.origin, sliced.shape
        came_to, cache = ready.allocator.budget.sparsity(shape), ready.prices.cache(shape)
        return {
            **origin.entries,
            "budget": ready.allocator.budget,
            "parameters": {"before": origin.parameters, **ready.prices.of_a_token(shape)},
            "stored_dtype": origin.stored_dtype,
            "config": chosen_settings(self.args),
            "shapes": self.args.shapes,
            "teachers": {"count": len(self.teachers_met()), "sparsities": self.teachers_met()},
            "bad_steps": self.bad_steps.total,
            "seed": self.args.seed,
            **self.goal.record(came_to, cache),
        }

    def teachers_met(self) -> list[float]:
        """Return the sparsities of the teachers used so far: none here."""
        return []


class _EndOfStep(TrainerCallback):
    def __init__(self, trainer: NutePruneTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.end_step()
