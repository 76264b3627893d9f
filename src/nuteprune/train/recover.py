"""Recovery fine-tuning of a sliced model: LoRA on all projections, merged at the end.

Source: the paper's post fine-tuning (Alpaca, two epochs, rate 1e-4, LoRA on all projections).

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from nuteprune.data.examples import pad
from nuteprune.distill.losses import Head, language_model_loss
from nuteprune.errors import RunFailed, UserError
from nuteprune.model.anatomy import Anatomy, no_logits
from nuteprune.model.forwards import noting_outputs
from nuteprune.model.lora import LoraBank, lora_in_base_dtype
from nuteprune.model.trainable import add_lora, leave_out
from nuteprune.shrink.finalize import merge_layer
from nuteprune.train.checkpoints import AtomicTrainer
from nuteprune.train.checks import check_given, check_whole
from nuteprune.train.config import RecoverConfig
from nuteprune.train.state import RunState


class RecoverTrainer(AtomicTrainer):
    """Trains LoRA on all projections of a pruned (or dense) model on the language-model loss.

    Args:
        model: a causal LM of a supported family; it is wrapped with LoRA, and `merge` uses it up.
        args: the settings.
        train_dataset: items with `input_ids` and `labels` (T,), of any lengths.
        processing_class: the tokenizer.
        **kwargs: `job`, the job's settings, which go into run/settings.json too; the others are
            passed on to `transformers.Trainer`.

    Raises:
        UserError: for an unsupported model, an empty dataset, or where it is to be sharded.
    """

    args: RecoverConfig
    model: PeftModel
    how_to_write = "write what merge() returns with save_pretrained"

    def __init__(
        self,
        model: PreTrainedModel,
        args: RecoverConfig,
        train_dataset: Dataset[Any],
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        check_whole(args)
        check_given(model, kwargs)
        if hasattr(train_dataset, "__len__") and not len(train_dataset):
            raise UserError("train_dataset is empty: pass items with input_ids and labels")
        set_seed(args.seed)
        rank, dropout = args.lora_rank, args.lora_dropout
        wrapped = add_lora(Anatomy(model), r=rank, lora_alpha=rank, lora_dropout=dropout)
        leave_out(wrapped)
        self.anatomy = Anatomy(wrapped)
        self.bank = LoraBank(self.anatomy)
        super().__init__(
            wrapped,
            args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            # Padding is masked, and every model has the token 0.
            data_collator=kwargs.pop("data_collator", None) or partial(pad, padding=0),
            compute_loss_func=self._loss,
            **kwargs,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **more: Any
    ) -> Any:
        """Return the language-model loss; see `transformers.Trainer.compute_loss`."""
        inputs = {**inputs, "use_cache": False, "logits_to_keep": no_logits(inputs["input_ids"])}
        head = noting_outputs([self.anatomy.final_norm])
        with lora_in_base_dtype(self.anatomy), head as self._read:
            return super().compute_loss(model, inputs, *args, **more)

    def _loss(self, _: Any, labels_BT: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        head = Head.of(self.anatomy)
        return language_model_loss(self._read.pop(), head, labels_BT, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write each logged step to the run's metrics.

        Raises:
            RunFailed: if the loss or its gradients are not finite.
        """
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
        learned, model = self.bank.learned(), self.model.eval().unload()
        anatomy = Anatomy(model)
        for layer in range(len(anatomy.layers)):
            merge_layer(anatomy, layer, learned, model.dtype)
        return model  # type: ignore[no-any-return]

    def run_state(self) -> RunState:
        """Return the LoRA weights."""
        return RunState({"lora": self.bank.state()})

    def take_state(self, state: RunState) -> None:
        """Load the LoRA weights of an earlier state."""
        self.bank.load(state.lora)
