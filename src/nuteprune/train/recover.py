"""Recovery fine-tuning of a sliced model: LoRA on all projections, merged at the end.

Source: the paper's post fine-tuning (Alpaca, two epochs, rate 1e-4, LoRA on all projections).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SchedulerType, TrainingArguments
from transformers.trainer_utils import set_seed

from nuteprune.data.examples import pad
from nuteprune.distill.losses import Head, language_model_loss
from nuteprune.errors import RunFailed, UserError
from nuteprune.model.anatomy import Anatomy, no_logits, reading_head
from nuteprune.model.lora import LoraBank, lora_in_base_dtype
from nuteprune.shrink.finalize import merge_lora
from nuteprune.train.checkpoints import AtomicTrainer
from nuteprune.train.checks import check_trainer_settings, check_whole
from nuteprune.train.state import RunState, restore


@dataclass
class RecoverConfig(TrainingArguments):
    """Settings of a `RecoverTrainer`: those below, and all of `transformers.TrainingArguments`.

    Args:
        lora_rank: rank of the adapters.
        lora_alpha: their scale is alpha / rank; None: 1.
        lora_dropout: share of the adapters' input that is dropped in training.
    """

    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale is alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of inputs dropped."})

    # Defaults of TrainingArguments that differ here.
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of LoRA."})
    lr_scheduler_type: SchedulerType | str = field(
        default="linear", metadata={"help": "How the learning rate falls."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Sequences per step."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between logs."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Trackers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trainer_settings(self)
        if self.lora_rank < 1 or self.per_device_train_batch_size < 1:
            raise UserError(
                f"LoRA rank {self.lora_rank}, batch size {self.per_device_train_batch_size}: "
                "pass at least 1 of each"
            )
        if not self.learning_rate > 0:
            raise UserError(f"learning rate {self.learning_rate}: pass one above 0, such as 1e-4")


class RecoverTrainer(AtomicTrainer):
    """Trains LoRA on all projections of a pruned (or dense) model on the language-model loss.

    Args:
        model: a causal LM of a supported family; it is wrapped with LoRA, and `merge` uses it up.
        args: the settings.
        train_dataset: items with `input_ids` and `labels` (T,), of any lengths.
        processing_class: the tokenizer.
        **kwargs: passed on to `transformers.Trainer`.

    Raises:
        UserError: for an unsupported model, or where it is to be sharded.
    """

    args: RecoverConfig
    model: PeftModel

    def __init__(
        self,
        model: PreTrainedModel,
        args: RecoverConfig,
        train_dataset: Dataset[Any],
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        check_whole(args)
        dense = Anatomy(model)
        model.requires_grad_(False)
        set_seed(args.seed)  # LoRA starts from random values
        settings = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha or args.lora_rank,
            lora_dropout=args.lora_dropout,
            target_modules=dense.lora_targets(),
            task_type="CAUSAL_LM",
        )
        wrapped = get_peft_model(model, settings)
        self.anatomy = Anatomy(wrapped)
        self.bank = LoraBank(self.anatomy)
        super().__init__(
            model=wrapped,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=partial(pad, padding=0),  # masked, and every model has it
            compute_loss_func=self._loss,
            **kwargs,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **more: Any
    ) -> Any:
        """Return the language-model loss; see `transformers.Trainer.compute_loss`."""
        inputs = {**inputs, "use_cache": False, "logits_to_keep": no_logits(inputs["input_ids"])}
        with lora_in_base_dtype(self.anatomy), reading_head(self.anatomy) as self._read:
            return super().compute_loss(model, inputs, *args, **more)

    def _loss(self, _: Any, labels_BT: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        head = Head.of(self.anatomy)
        return language_model_loss(self._read.pop(), head, labels_BT, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write each logged step to the run's metrics.

        Raises:
            RunFailed: if the loss or its gradients are not finite.
        """
        if "loss" in logs:
            self.write_metrics(logs)
        super().log(logs, start_time)
        # Under float16 the scale is found by letting gradients overflow now and then.
        names = ("loss",) if self.args.fp16 else ("loss", "grad_norm")
        figures = [float(logs[name]) for name in names if name in logs]
        if not all(map(math.isfinite, figures)):
            raise RunFailed(
                f"the loss or its gradients are not finite at step {self.state.global_step}; lower "
                f"--learning-rate (now {self.args.learning_rate:g}), or use --dtype float32"
            )

    def merge(self) -> PreTrainedModel:
        """Add the LoRA weights to the model's, in fp32, and return it without adapters."""
        self.model.eval()
        return merge_lora(self.model)

    def run_state(self) -> RunState:
        """Return what has been learned: the LoRA weights."""
        return RunState(lora=self.bank.state())

    def take_state(self, state: RunState) -> None:
        """Go back to what had been learned."""
        restore(self.bank.state(), state.lora, "LoRA weights")
