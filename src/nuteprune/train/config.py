"""Settings of the trainers: ours, and with them all of `transformers.TrainingArguments`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from transformers import SchedulerType, TrainingArguments

from nuteprune.distill.coforward import RELATIVE, TEXT, Objective
from nuteprune.errors import UserError
from nuteprune.gates.importance import METHODS
from nuteprune.train.checks import check_combinations, check_trainer_settings
from nuteprune.train.declared import check_declared, setting
from nuteprune.train.settings import PruneSettings, RecoverSettings

FALLS_LATE = {"power": 0.5, "lr_end": 0.0}
"""`lr_scheduler_kwargs` of `polynomial` by default: the square root of what is left."""
REFIT_BLOCKS = 4.5
"""Blocks of the refit, for each block that scores are taken on."""


@dataclass
class RunArguments(TrainingArguments):
    """What the settings of all runs have in common, as `transformers.Trainer` takes them."""

    # Defaults of TrainingArguments that differ here.
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False

    FOLLOWING: ClassVar[Mapping[str, Any]] = {}
    """Settings that are left open -> what follows from the others: on no record."""

    def __post_init__(self) -> None:
        """Check what was given.

        Raises:
            UserError: naming a setting that cannot work.
        """
        if isinstance(self.report_to, str):
            self.report_to = [name.strip() for name in self.report_to.split(",")]
        super().__post_init__()
        check_trainer_settings(self)
        check_declared(self)

    @property
    def sequences_per_step(self) -> int:
        """How many sequences all processes together learn from in a step."""
        return int(self.train_batch_size * self.gradient_accumulation_steps * self.world_size)


@dataclass
class NutePruneConfig(PruneSettings, RunArguments):  # type: ignore[misc]  # an open rate
    """Settings of a `NutePruneTrainer`: those below, and all of `transformers.TrainingArguments`.

    Parameters that control what is removed:

    Args:
        target_sparsity: share of the decoder layers' projection parameters to remove, in (0, 1);
            several, comma separated or a list, give a checkpoint each: the run rests at each.
        target_params: the most parameters that may stay, such as 100M, instead of a sparsity; all
            of the model's, tied ones once. Several are given as sparsities are.
        target_active_params: the most parameters that a token may go through, such as 3B, instead
            of a sparsity: of a mixture of experts, without the experts that it is not routed to.
        target_size: the most bytes of the weight file, such as 200MB, instead of a sparsity.
        target_memory: the most bytes of the weight file and the KV cache, instead of a sparsity:
            4GiB@8192 is for 8192 tokens in the cache, 4GiB@2x8192 for two such sequences.
        target_speedup: how many times as fast the model is to be, instead of a sparsity: 1.5 in
            decoding, 1.5@prefill, or 1.5@both:1x512+64 (sequences x prompt + new tokens); by the
            seconds of a table of costs. Blocks are then among the gates.
        costs: the table, a file or its content; the commands measure one where none is given.
        shape: dimensions to cut to, instead of a target: see `model.shape.Shape.cut_to`.
        gates: kinds of gates, comma separated (`heads`, `kv_groups`, `neurons`, `experts`,
            `expert_neurons`, `hidden`, `attn_block`, `mlp_block`); None: heads (KV groups under
            grouped-query attention) and neurons, of a mixture experts, or what the method is made
            for (`similarity`: both blocks).
        shapes: `free` (each layer its own counts) or `uniform` (the same in all).
        neuron_multiple: neurons kept per layer are a multiple of it.
        hidden_multiple: the width kept is a multiple of it.
        for_quantization: both multiples are multiples of 256 too, which K-quants store together;
            gates that could not keep rows whole are refused.

    Parameters that control how units are chosen:

    Args:
        method: the one-shot scoring that ranks units: a key of `gates.importance.METHODS`.
        calibration_blocks: blocks of text for the scores; the refit reads 4.5 times as many.
        text_blocks: blocks of text in all; None: what the steps and the stages before them read.

    Parameters that control distillation:

    Args:
        teacher: `dense` (the dense model) or `none`: the text itself is learned, by the
            language-model loss.
        unlikelihood: weight of the unlikelihood of repeats in the student's own answers, late in
            the run; see `train.own_answers`. It needs a tokenizer with a chat template. 0: none.

    Parameters that control LoRA and the refit:

    Args:
        lora_rank: rank of the adapters.
        refit: fit the output and down projections in closed form when masks freeze:
            whole, or as low-rank start of LoRA where weights are in 8 or 4 bits.

    Parameters of the run:

    Args:
        sharded: share the dense model's weights out over the run's processes (FSDP2); gates and
            LoRA stay whole in each.
        offload: keep the dense model's decoder layers in main memory, or on disk where they are
            mapped from files; each comes to the device as it is read.
    """

    # Defaults of TrainingArguments that differ here.
    lr_scheduler_type: SchedulerType | str = "polynomial"
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    weight_decay: float = 0.01
    max_grad_norm: float = 0.5
    save_steps: float = 50
    report_to: list[str] | str | None = "none"

    PIPELINE: ClassVar[str] = "nuteprune.pipeline"
    """The module whose `pipeline` goes through a run's stages."""
    FOLLOWING: ClassVar[Mapping[str, Any]] = {
        "lr_scheduler_kwargs": FALLS_LATE,
        "gradient_checkpointing": False,
        "activation_checkpointing": False,
    }

    def __post_init__(self) -> None:
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == SchedulerType.POLYNOMIAL:
            self.lr_scheduler_kwargs = dict(FALLS_LATE)
        RunArguments.__post_init__(self)
        PruneSettings.__post_init__(self)
        if self.ddp_find_unused_parameters is None:  # frozen gates are unused
            self.ddp_find_unused_parameters = self.has_unused_parameters
        check_combinations(self)
        if self.progressive and type(self).PIPELINE == NutePruneConfig.PIPELINE:
            raise UserError(
                "progressive settings are those of nuteprune.progressive.config.ProgressiveConfig"
            )

    @property
    def reads_own_answers(self) -> bool:
        """Whether the student reads its own answers late in the run: with fixed masks it does."""
        return self.unlikelihood > 0 and self.teacher == "dense" and not self.progressive

    @property
    def losses(self) -> Objective:
        """What the student is trained on."""
        return TEXT if self.teacher == "none" else RELATIVE

    @property
    def has_narrow_lora(self) -> bool:
        """Whether LoRA is on queries and values alone."""
        return False

    @property
    def has_unused_parameters(self) -> bool:
        """Whether parameters that are trained may have no gradients."""
        return False

    @property
    def scored_blocks(self) -> int:
        """Blocks that the one-shot scores read."""
        return self.calibration_blocks * METHODS[self.method].reads

    @property
    def refit_blocks(self) -> int:
        """Blocks that the refit reads."""
        return round(REFIT_BLOCKS * self.calibration_blocks) if self.refit else 0

    @property
    def tried(self) -> bool:
        """Whether cuts are tried between rounds of scoring, if the model allows it."""
        # With a refit, and masks that are chosen before the first step.
        return self.refit and not self.progressive and METHODS[self.method].reads > 0

    @property
    def calibrated_blocks(self) -> int:
        """Blocks that are read before the first step."""
        return max(self.scored_blocks, self.refit_blocks)

    @property
    def blocks(self) -> int:
        """Blocks that the run needs: its steps share them with the stages before."""
        taught = self.text_blocks or self.max_steps * self.sequences_per_step
        return max(1, taught, self.calibrated_blocks)

    @property
    def gate_kinds(self) -> tuple[str, ...] | None:
        """Kinds of gates asked for, None to let the model decide."""
        if not self.gates:
            return METHODS[self.method].default_kinds
        return tuple(k.strip() for k in self.gates.split(","))


def prune_config(settings: Mapping[str, Any]) -> type[NutePruneConfig]:
    """Return the class of a run's settings: the paper's own dynamics have another one."""
    if not settings.get("progressive"):
        return NutePruneConfig
    kind: type[NutePruneConfig] = import_module("nuteprune.progressive.config").ProgressiveConfig
    return kind


@dataclass
class RecoverConfig(RecoverSettings, RunArguments):
    """Settings of a `RecoverTrainer`: those below, and all of `transformers.TrainingArguments`.

    Args:
        lora_rank: rank of the adapters.
        lora_dropout: share of the adapters' input that is dropped in training.
    """

    lora_dropout: float = setting("Share of inputs dropped.", 0.0, bounds=(0, 1))

    # Defaults of TrainingArguments that differ here.
    learning_rate: float = 1e-4
    per_device_train_batch_size: int = 8
