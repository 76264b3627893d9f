"""Settings of the trainers: ours, and with them all of `transformers.TrainingArguments`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import SchedulerType

from nuteprune.gates.importance import METHODS
from nuteprune.progressive.gate_types import GATE_TYPES
from nuteprune.train.arguments import RunArguments
from nuteprune.train.checks import check_combinations
from nuteprune.train.prune_settings import METHOD, PruneSettings
from nuteprune.train.settings import setting

FALLS_LATE = {"power": 0.5, "lr_end": 0.0}
"""`lr_scheduler_kwargs` of `polynomial` by default: the square root of what is left."""
REFIT_BLOCKS = 4.5
"""Blocks of the re-fit, for each block that scores are taken on."""
PRICED_BLOCKS = 0.5
"""The same of what tells the price of units at the target, which no re-fit reads."""


@dataclass
class NutePruneConfig(PruneSettings, RunArguments):
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
        gate_type: `ranked` (hard masks by the scores, which a ramp re-estimates from gradients)
            or `hard_concrete` (the paper's stochastic gates, driven by its Lagrangian).
        calibration_blocks: blocks of text for the scores; the re-fit reads 4.5 times as many.
        ramp_share: share of the steps by which the target is reached; masks are frozen there. 0:
            at the first step; without a ramp there are no teachers on the way. None: 0 for ranked
            gates, 0.5 for hard-concrete ones.
        freeze_share: share of the steps by which masks are frozen, if later than the ramp's end;
            None: as `ramp_share`. Both 0: masks are frozen, and weights re-fitted, before the first
            step.

    Parameters that control distillation:

    Args:
        teachers: `numerous` (snapshots on the way), `dense` (the dense model alone), or `none`:
            the text itself is learned, by the language-model loss.
        objective: `relative` (token KL, and layer terms relative to the teacher's norm) or `paper`.

    Parameters that control LoRA and the re-fit:

    Args:
        lora_rank: rank of the adapters.
        lora_targets: `all` projections or `qv` (queries and values, the paper's).
        compensation: re-fit the output and down projections in closed form when masks freeze:
            whole, or as low-rank start of LoRA where weights are sharded or in 8 or 4 bits.

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
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False

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
            self.ddp_find_unused_parameters = GATE_TYPES[self.gate_type].trained
        check_combinations(self, METHOD)

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of a target's steps by which it is reached, and masks are frozen."""
        ramp = GATE_TYPES[self.gate_type].ramp_share if self.ramp_share is None else self.ramp_share
        return ramp, ramp if self.freeze_share is None else self.freeze_share

    @property
    def pipeline(self) -> str:
        """The module whose `pipeline` goes through the run's stages."""
        return f"nuteprune.{'progressive.' if self.is_progressive else ''}pipeline"

    @property
    def is_progressive(self) -> bool:
        """Whether masks move while the student learns."""
        return GATE_TYPES[self.gate_type].trained or any(self.shares)

    @property
    def staged(self) -> bool:
        """Whether a ramp has a share of the steps."""
        return any(self.shares)

    @property
    def scored_blocks(self) -> int:
        """Blocks that the one-shot scores read, those without gradients among them."""
        if not GATE_TYPES[self.gate_type].ranked:
            return 0
        method = METHODS[self.method]
        return self.calibration_blocks * max(int(method.reads), method.reads_plain)

    @property
    def refit_blocks(self) -> int:
        """Blocks that the re-fit reads."""
        return round(REFIT_BLOCKS * self.calibration_blocks) if self.compensation else 0

    @property
    def tried(self) -> bool:
        """Whether a cut can be tried: masks come at once, and whole weights are re-fitted."""
        return self.compensation and not (any(self.shares) or self.sharded)

    @property
    def priced_blocks(self) -> int:
        """Blocks that tell what units cost at the target, beside what the re-fit reads."""
        priced = METHODS[self.method].priced and self.tried
        return math.ceil(PRICED_BLOCKS * self.calibration_blocks) * priced

    @property
    def calibrated_blocks(self) -> int:
        """Blocks that are read before the first step."""
        return max(self.scored_blocks, self.refit_blocks + self.priced_blocks)

    @property
    def blocks(self) -> int:
        """Blocks that the run needs: its steps share them with what comes before."""
        return max(1, self.max_steps * self.sequences_per_step, self.calibrated_blocks)

    @property
    def gate_kinds(self) -> tuple[str, ...] | None:
        """Kinds of gates asked for, None to let the model decide."""
        if not self.gates:
            return METHODS[self.method].default_kinds
        return tuple(k.strip() for k in self.gates.split(","))


@dataclass
class RecoverConfig(RunArguments):
    """Settings of a `RecoverTrainer`: those below, and all of `transformers.TrainingArguments`.

    Args:
        lora_rank: rank of the adapters.
        lora_dropout: share of the adapters' input that is dropped in training.
    """

    lora_rank: int = setting(8, "Rank of the adapters.", bounds=(1, 1e5))
    lora_dropout: float = setting(0.0, "Share of inputs dropped.", bounds=(0, 1))

    # Defaults of TrainingArguments that differ here.
    learning_rate: float = 1e-4
    per_device_train_batch_size: int = 8
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
