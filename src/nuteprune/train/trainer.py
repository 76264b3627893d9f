"""NutePruneTrainer: runs the method on top of `transformers.Trainer`; orchestration only.

A step: gates give the masks of the moment, one pass of the backbone plays student and teacher,
distillation losses train LoRA (and log-alpha), snapshots become teachers. At the end: finalize.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints, set_seed

from nuteprune.distill.coforward import CoForward
from nuteprune.distill.losses import LAYER_TERMS, Head, token_kl
from nuteprune.distill.teachers import INTACT, Plan, Role, Teachers
from nuteprune.errors import RunFailed, UserError
from nuteprune.export.checkpoint import assemble
from nuteprune.export.record import write_pruned
from nuteprune.gates.allocate import Allocator, Constraints
from nuteprune.gates.budget import Budget
from nuteprune.gates.gates import Gates, RankedGates
from nuteprune.gates.importance import METHODS, Probe, check_kinds
from nuteprune.gates.masks import Masks
from nuteprune.gates.multipliers import DeterministicGates
from nuteprune.gates.schedule import Schedule
from nuteprune.gates.soft import HardConcreteGates
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import Projection
from nuteprune.model.hooks import MaskHooks
from nuteprune.shrink.compensate import Fit, Install, install_weight, low_rank, refit
from nuteprune.shrink.finalize import merge_lora
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.state import RunState, restore

Progress = Callable[[str, int, int], None]
"""Told (what is being done, units done, units in all) during long work outside of training."""


class NutePruneTrainer(Trainer):
    """Prunes a causal language model while it learns from less pruned versions of itself.

    Args:
        model: an intact causal LM of a supported family; it is wrapped with LoRA, and `finalize`
            uses it up.
        args: the run's settings.
        train_dataset: items with `input_ids` (T,) of equal length and, where there is padding,
            `attention_mask` (T,).
        processing_class: the tokenizer, saved with the result.
        progress: told about long work outside of training.
        **kwargs: passed on to `transformers.Trainer`.

    Raises:
        UserError: for an unsupported model, gates that its family cannot take, or a target out of
            the gates' reach; before anything is changed.
    """

    args: NutePruneConfig
    model: PeftModel

    def __init__(
        self,
        model: PreTrainedModel,
        args: NutePruneConfig,
        train_dataset: Dataset[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        progress: Progress = lambda what, done, total: None,
        **kwargs: Any,
    ) -> None:
        intact = Anatomy(model)
        self._total_before = intact.parameters()
        self.stored_dtype: torch.dtype = model.dtype
        self.allocator = make_allocator(intact, args)
        # Fails early, before the model is touched, if the target is out of reach.
        ones = {k: torch.ones(self.allocator.layout.units(k)) for k in self.kinds}
        self.allocator.shape(ones, args.target_sparsity)
        self.progress = progress
        model.requires_grad_(False)
        set_seed(args.seed)  # LoRA starts from random values
        peft_model = get_peft_model(model, lora_config(intact, args))
        self.anatomy = Anatomy(peft_model)
        self.hooks = MaskHooks(self.anatomy)
        term = LAYER_TERMS[args.layer_term] if args.layer_weight else None
        self.coforward = CoForward(self.anatomy, self.hooks, term)
        ramp_share = 0.0 if args.one_shot else args.ramp_share
        self.schedule = Schedule(args.target_sparsity, args.max_steps, ramp_share, args.ramp_power)
        self.plan = Plan.for_target(args.target_sparsity, self.schedule.ramp_steps)
        run = Path(cast(str, args.output_dir))
        self.teachers = Teachers(run / "teachers", self.allocator.layout)
        self.gates: Gates = make_gates(self.allocator, ones, args)
        peft_model.add_module("nuteprune_gates", self.gates)
        self._warm = False
        self.first_scores: dict[str, Tensor] = {}
        self._checkpoint_dir: Path | None = None
        self._step = -1
        self._teacher: Role | None = INTACT
        self.teacher_index = -1
        self.parts: dict[str, Tensor | float] = {}
        self.metrics_file = run / "metrics.jsonl"
        super().__init__(
            model=peft_model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=[_EndOfStep(self), *kwargs.pop("callbacks", [])],
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        self._bad_in_row = torch.zeros((), dtype=torch.long, device=self.args.device)
        self._bad_steps = torch.zeros((), dtype=torch.long, device=self.args.device)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of gates in use."""
        return self.allocator.constraints.kinds

    @property
    def freeze_step(self) -> int:
        """Step before which masks are frozen, counted from 0."""
        if self.args.one_shot:
            return 0
        return max(self.schedule.ramp_steps, round(self.args.freeze_share * self.args.max_steps))

    # -- before the first step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Run the steps; see `transformers.Trainer.train`."""
        if not self._warm and not kwargs.get("resume_from_checkpoint"):
            self.warm_start()
        return super().train(*args, **kwargs)

    def warm_start(self) -> None:
        """Score all units on calibration text and start the gates from the scores."""
        if self.args.warm_start or self.args.one_shot:
            method = METHODS[self.args.scoring]
            batches = self._calibration(self.args.calibration_blocks) if method.reads else []
            tick = self._counted(f"scoring {' and '.join(self.kinds)}", len(batches))
            probe = Probe(
                self.anatomy,
                self.hooks,
                self.allocator.budget,
                self.kinds,
                batches,
                self.args.seed,
                tick,
            )
            with self._frozen_parameters():
                scores = method.score(probe)
            fresh = make_gates(self.allocator, scores, self.args)
            self.gates.load_state_dict(fresh.state_dict())
        self.first_scores = {k: v.cpu().clone() for k, v in self.gates.scores.items()}
        self._warm = True

    def _calibration(self, count: int) -> list[Tensor]:
        """Return token ids (B, T) of `count` blocks from the end of the training text.

        The end is what training itself comes to last, if at all.
        """
        dataset = cast(Any, self.train_dataset)
        size = len(dataset)
        picks = [size - 1 - i % size for i in range(count)]
        ids = torch.stack([torch.as_tensor(dataset[i]["input_ids"]) for i in picks])
        return list(ids.split(self.args.per_device_train_batch_size))

    @contextmanager
    def _frozen_parameters(self) -> Iterator[None]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def _counted(self, what: str, total: int) -> Callable[[], None]:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            self.progress(what, done, total)

        self.progress(what, 0, total)
        return tick

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with a group for LoRA and, where gates are trained, theirs."""
        if self.optimizer is None:
            lora = [p for n, p in self.model.named_parameters() if "lora_" in n]
            groups = self.gates.parameter_groups(self.args.gate_learning_rate)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, self.model))
            self.optimizer = kind([{"params": lora}, *groups], **settings)
        return self.optimizer

    # -- a step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Run one micro-batch; the first of a step prepares masks and teacher."""
        if self._step != self.state.global_step:
            self._step = self.state.global_step
            self._begin_step(self._step)
        loss = super().training_step(model, inputs, *args)
        self.hooks.masks = None
        self.gates.observe()
        return loss

    def _begin_step(self, step: int) -> None:
        if step >= self.freeze_step and not self.gates.frozen:
            self.freeze()
        seed = (self.args.seed << 32) + step
        self.gates.begin_step(self.schedule.sparsity(step), seed)
        self.teacher_index = self._teacher_for(step)
        self._teacher = None
        if self.args.teachers != "none":
            self._teacher = self.teachers.role(self.teacher_index, str(self.args.device))

    def _teacher_for(self, step: int) -> int:
        if self.args.teachers != "numerous":
            return -1
        count = len(self.teachers)
        if not self.schedule.done(step):
            return self.plan.growing(count)
        ramp = self.schedule.ramp_steps
        left = max(1, self.args.max_steps - ramp)
        return max(-1, self.plan.returning(count, min(0.999999, (step - ramp + 1) / left)))

    def end_step(self) -> None:
        """Finish an optimizer step: scores follow, and a snapshot is taken where one is due."""
        self.gates.end_step()
        sparsity = self.gates.sparsity()
        numerous = self.args.teachers == "numerous"
        if numerous and not self.gates.frozen and self.plan.due(sparsity, self.teachers.newest):
            self.teachers.record(sparsity, self.gates.snapshot(), self.coforward.bank.state())

    def freeze(self) -> None:
        """Fix the masks, and start LoRA from the closed-form re-fit where that is asked for."""
        masks = self.gates.freeze(self.args.target_sparsity)
        if self.args.compensation == "start":
            self._start_from_refit(masks)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the distillation loss of a micro-batch plus the step's sparsity term."""
        ids_BT = inputs["input_ids"]
        mask_BT = inputs.get("attention_mask")
        weight_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        weight_BT = weight_BT.float()
        call: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
        if self.args.lm_weight:
            call["labels"] = ids_BT.masked_fill(weight_BT == 0, -100)
        else:
            call["logits_to_keep"] = 1
        masks = self.gates.masks(len(ids_BT))
        with self.coforward.roles(masks, self._teacher, weight_BT) as passage:
            output = model(**call)
        parts: dict[str, Tensor] = {}
        if passage.teacher_BTD is not None:
            assert passage.student_BTD is not None
            parts["token_kl"] = self.args.token_weight * token_kl(
                passage.student_BTD,
                passage.teacher_BTD,
                self._head(),
                weight_BT,
                self.args.kd_temperature,
            )
        if passage.layer_loss is not None:
            scale = 1 if self.args.layer_term == "mse" else len(self.anatomy.layers)
            parts["layer"] = self.args.layer_weight * passage.layer_loss / scale
        if self.args.lm_weight:
            parts["lm"] = self.args.lm_weight * output.loss
        penalty = self.gates.penalty()
        if penalty is not None:
            parts["penalty"] = penalty
        self.parts = {name: value.detach() for name, value in parts.items()}
        return torch.stack(list(parts.values())).sum()

    def _head(self) -> Head:
        head = self.anatomy.head
        return Head(head.weight, getattr(head, "bias", None), *self.anatomy.logit_scale())

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients of LoRA alone, and drop those of a step that is not finite."""
        trained = [p for p in model.parameters() if p.grad is not None]
        lora = [p for n, p in model.named_parameters() if "lora_" in n and p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in lora if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(lora, self.args.max_grad_norm, norm)
        bad = ~torch.isfinite(norm)
        self._bad_steps += bad
        self._bad_in_row = (self._bad_in_row + 1) * bad
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad = torch.where(bad, torch.zeros_like(parameter.grad), parameter.grad)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's figures to the logs, and each step's line to metrics.jsonl.

        Raises:
            RunFailed: after `max_bad_steps` steps in a row that were not finite.
        """
        if "loss" in logs:
            logs |= {name: float(value) for name, value in self.parts.items()}
            logs |= {
                "sparsity": self.gates.sparsity(),
                "target": self.schedule.sparsity(self._step),
                "teacher": self.teacher_index,
                "teachers": len(self.teachers),
                "bad_steps": int(self._bad_steps),
            }
            if self.args.should_save:
                self._write_metrics({"step": self.state.global_step, **logs})
        super().log(logs, start_time)
        if int(self._bad_in_row) >= self.args.max_bad_steps:
            raise RunFailed(
                f"the loss or its gradients were not finite in {int(self._bad_in_row)} steps in a "
                f"row, up to step {self.state.global_step}; lower learning_rate (now "
                f"{self.args.learning_rate}), or use --dtype float32"
            )

    def _write_metrics(self, line: dict[str, Any]) -> None:
        self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # -- checkpoints of a run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, and move it there when it is complete."""
        run = Path(cast(str, self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        partial = run / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        self._checkpoint_dir = partial
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoint_dir = None
        if self.args.should_save:
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(partial / name, run / name)
            shutil.rmtree(partial, ignore_errors=True)
            rotate_checkpoints(output_dir=str(run), save_total_limit=self.args.save_total_limit)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_dir or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save what the run has learned; the base model is where it came from."""
        folder = Path(cast(str, output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        masks = self.gates.snapshot().values if self.gates.frozen else {}
        state = RunState(
            self.coforward.bank.state(), self.gates.state_dict(), masks, self.teachers.sparsities
        )
        state.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Go back to a checkpoint: LoRA, gates, teachers, and the metrics up to it."""
        folder = Path(resume_from_checkpoint)
        state = RunState.load(folder)
        restore(self.coforward.bank.state(), state.lora, "LoRA weights")
        restore(self.gates.state_dict(), state.gates, "gates")
        if state.masks:
            self.gates.restore_masks(Masks(self.allocator.layout, state.masks))
        self.teachers.restore(state.teachers)
        self._warm = True
        self._cut_metrics(int(folder.name.rpartition("-")[2]))

    def _cut_metrics(self, step: int) -> None:
        if self.metrics_file.exists():
            lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
            partial = self.metrics_file.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, self.metrics_file)

    # -- after the last step

    def _start_from_refit(self, masks: Masks) -> None:
        """Let LoRA start from the closed-form re-fit of the frozen masks, at its own rank."""
        bank = self.coforward.bank

        def install(layer: int, projection: Projection, fit: Fit) -> None:
            base = self.anatomy.linear(layer, projection)
            assert base is not None
            bank.set_delta(layer, projection, *low_rank(fit, base.weight, self.args.lora_rank))

        self._refit(self.anatomy, self.hooks, masks, install)

    def _refit(self, anatomy: Anatomy, hooks: MaskHooks, masks: Masks, install: Install) -> None:
        batches = self._calibration(self.args.compensation_blocks)
        tick = self._counted("re-fitting projections", len(anatomy.layers))
        refit(anatomy, hooks, masks, batches, install, tick)

    def finalize(self) -> PreTrainedModel:
        """Freeze, merge, re-fit, fold and slice; uses the trainer's model up.

        Returns:
            The smaller model, of a stock class if its shape allows, else of a subclass of it.
        """
        if not self._warm:
            self.warm_start()
        if not self.gates.frozen:
            self.freeze()
        self.masks = self.gates.snapshot().to("cpu")
        self.bad_steps = int(self._bad_steps)
        self.hooks.remove()
        self.model.eval()
        stock = merge_lora(self.model)
        anatomy = Anatomy(stock)
        if self.args.compensation == "finalize":
            hooks = MaskHooks(anatomy)
            masks = self.masks.to(self.args.device)
            self._refit(anatomy, hooks, masks, install_weight(anatomy))
            hooks.remove()
        self.small, self.shape = assemble(anatomy, self.masks)
        return self.small

    def save_pruned(self, folder: str | os.PathLike[str], **record: Any) -> dict[str, Any]:
        """Write the finalized model, its tokenizer, record and card.

        Args:
            folder: absent, empty, or with nothing but `run/` in it.
            **record: what else the record is to hold, such as `perplexity` and `base_model`.

        Returns:
            The record as it was written; parameter counts are those of the written files.
        """
        tokenizer = cast(PreTrainedTokenizerBase | None, self.processing_class)
        budget = self.allocator.budget
        return write_pruned(
            Path(folder),
            cast(Any, self.small).to(self.stored_dtype),
            tokenizer,
            params={"before": self._total_before, "blocks_before": budget.before},
            target=self.args.target_sparsity,
            before=budget.shape,
            after=self.shape,
            shapes=self.args.shapes,
            teachers={"count": len(self.teachers), "sparsities": self.teachers.sparsities},
            bad_steps=self.bad_steps,
            seed=self.args.seed,
            **record,
        )


class _EndOfStep(TrainerCallback):
    def __init__(self, trainer: NutePruneTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.end_step()


def make_allocator(anatomy: Anatomy, args: NutePruneConfig) -> Allocator:
    """Return the allocator for a model under a run's constraints.

    Raises:
        UserError: for gates that the model's family cannot take.
    """
    shape = anatomy.shape
    grouped = any(x.heads_per_group > 1 for x in shape.layers)
    kinds = args.gate_kinds or ("kv_groups" if grouped else "heads", "neurons")
    if not grouped:
        kinds = tuple(dict.fromkeys("heads" if k == "kv_groups" else k for k in kinds))
    check_kinds(args.scoring, kinds)
    for kind in kinds:
        reason = anatomy.family.refusal(kind, uniform=args.shapes == "uniform")
        if reason:
            raise UserError(f"gates on {kind} cannot be used here: {reason}")
    constraints = Constraints(
        kinds, args.shapes == "uniform", args.neuron_multiple, args.hidden_multiple
    )
    return Allocator(Budget.of(anatomy), constraints)


def make_gates(allocator: Allocator, scores: Mapping[str, Tensor], args: NutePruneConfig) -> Gates:
    """Return gates of the run's type that start from scores."""
    if args.gate_type == "ranked":
        return RankedGates(allocator, scores, 1.0 if args.one_shot else args.score_decay)
    if args.gate_type == "hard_concrete":
        return HardConcreteGates(allocator, scores, args.warm_start, args.solved_schedule)
    return DeterministicGates(
        allocator, scores, args.target_sparsity, args.warm_start, args.solved_schedule
    )


def lora_config(anatomy: Anatomy, args: NutePruneConfig) -> LoraConfig:
    """Return PEFT's settings: adapters on all projections, or on those that make Q and V."""
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules=anatomy.lora_targets(args.lora_targets == "qv"),
        task_type="CAUSAL_LM",
    )
