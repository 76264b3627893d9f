"""All settings of runs, each declared once: what a recipe may set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any, ClassVar

from transformers import SchedulerType

from nuteprune.distill.objective import OBJECTIVES
from nuteprune.export.gguf_arch import SUPER_BLOCK
from nuteprune.gates.gate_types import GATE_TYPES
from nuteprune.gates.importance import METHODS
from nuteprune.model.family import GATE_KINDS
from nuteprune.train.arguments import RunArguments
from nuteprune.train.asked import KINDS, Asked, check_one, several, sparsities
from nuteprune.train.checks import check_combinations, check_kinds, check_targets
from nuteprune.train.settings import CALL, HOW, setting

METHOD = "surgeon"
"""The ranking by default: docs/quality.md says why."""
FALLS_LATE = {"power": 0.5, "lr_end": 0.0}
"""`lr_scheduler_kwargs` of `polynomial` by default: the square root of what is left."""
REFIT_BLOCKS = 4.5
"""Blocks of the re-fit, for each block that scores are taken on."""
PRICED_BLOCKS = 0.5
"""The same of what tells the price of units at the target, which no re-fit reads."""


@dataclass
class NutePruneConfig(RunArguments):
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
        target_memory: the most bytes of the weight file and the KV cache of `sequences` sequences
            of `context` tokens, such as 4GiB, instead of a sparsity.
        context: tokens of each sequence's KV cache.
        sequences: sequences at a time.
        target_speedup: how many times as fast the model is to be, such as 1.5, instead of a
            sparsity; by the seconds of a table of costs. Blocks are then among the gates.
        speed_for: what is to be faster: `decode`, `prefill` or `both`.
        speed_at: sequences x prompt + new tokens at which it is, such as 1x256+32.
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
        lora_alpha: their scale is alpha / rank; None: 1.
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

    target_sparsity: float | str | list[float] = setting(
        0.2,
        "Share of the decoder layers' parameters to remove, such as 0.2 (demo's default). "
        "Several (0.2,0.3,0.5) give several checkpoints from one run.",
        option="--sparsity",
    )
    target_params: float | str | list[Any] | None = setting(
        None,
        "Parameters to end at, instead of --sparsity, such as 100M: all of them, tied ones once.",
        option="--params",
    )
    target_active_params: float | str | list[Any] | None = setting(
        None,
        "Active parameters to end at, instead of --sparsity, such as 3B: of a mixture of experts "
        "only those that a token is routed to count.",
        option="--active-params",
    )
    target_size: float | str | list[Any] | None = setting(
        None,
        "Size of the weight file to end at, instead of --sparsity, such as 200MB or 190MiB; in "
        "the checkpoint's dtype.",
        option="--size",
    )
    target_memory: float | str | list[Any] | None = setting(
        None,
        "Memory of weights and KV cache to end at, instead of --sparsity, such as 4GiB; in the "
        "checkpoint's dtype, at --context tokens.",
        option="--memory",
    )
    context: int | None = setting(
        None, "Tokens of a sequence's KV cache, for --memory.", bounds=(1, 1e9), option="--context"
    )
    sequences: int = setting(
        1,
        "Sequences at a time, for --memory (default {default}).",
        bounds=(1, 1e6),
        option="--sequences",
    )
    target_speedup: float | str | list[Any] | None = setting(
        None,
        "Speed to end at, instead of --sparsity, such as 1.5 times the dense model's: measured on "
        "the run's device, or by --costs. Whole blocks may go too.",
        option="--speedup",
    )
    speed_for: str = setting(
        "decode",
        "What is to be faster: decode (default), prefill, or both.",
        choices=("decode", "prefill", "both"),
        option="--for",
    )
    speed_at: str = setting(
        "1x256+32",
        "For --speedup: sequences x tokens of the prompt + tokens after it (default {default}).",
        option="--speed-at",
    )
    costs: dict[str, Any] | str | None = setting(
        None,
        "For --speedup: a table of what blocks cost, from nuteprune bench MODEL --save-costs FILE, "
        "perhaps of another machine. Default: measured by the run.",
        option="--costs",
        role=CALL,
    )
    shape: dict[str, Any] | str | None = setting(
        None,
        "YAML or JSON file with the dimensions to cut to, instead of --sparsity. Another "
        "checkpoint's nuteprune.json serves too.",
        option="--shape",
    )
    gates: str | None = setting(
        None,
        f"Kinds of gates, comma separated: {', '.join(GATE_KINDS)}. Default: heads (KV groups "
        "where heads share one) and neurons; of a mixture of experts, experts.",
        option="--gates",
    )
    shapes: str = setting(
        "free",
        "free (default): each layer keeps its own counts. uniform: the same in all layers, a "
        "stock model.",
        choices=("free", "uniform"),
        option="--shapes",
    )
    neuron_multiple: int = setting(
        32,
        "Neurons kept per layer are a multiple of it (default {default}).",
        bounds=(1, 1e6),
        option="--neuron-multiple",
    )
    hidden_multiple: int = setting(
        64,
        "The width kept is a multiple of it (default {default}).",
        bounds=(1, 1e6),
        option="--hidden-multiple",
    )
    for_quantization: bool = setting(
        False,
        f"Neurons and width in multiples of {SUPER_BLOCK}, which llama.cpp's K-quants need.",
        option="--for-quantization",
        flag=True,
    )

    method: str = setting(
        METHOD,
        f"How units are ranked (default {METHOD}): {', '.join(METHODS)}.",
        choices=tuple(METHODS),
        option="--method",
    )
    gate_type: str = setting(
        "ranked", "ranked, or hard_concrete (the paper's).", choices=tuple(GATE_TYPES)
    )
    calibration_blocks: int = setting(32, "Blocks of text for the scores.", bounds=(1, 1e6))
    ramp_share: float | None = setting(
        None, "Share of the steps by which the target is reached.", bounds=(0, 1)
    )
    freeze_share: float | None = setting(
        None, "Share of the steps by which masks are frozen.", bounds=(0, 1)
    )

    teachers: str = setting(
        "numerous",
        "numerous (snapshots on the way), dense, or none (the text itself is learned).",
        choices=("numerous", "dense", "none"),
    )
    objective: str = setting(
        "relative", "relative, or paper (its weights and layer terms).", choices=tuple(OBJECTIVES)
    )

    lora_rank: int = setting(32, "Rank of the adapters.", bounds=(1, 1e5))
    lora_alpha: int | None = setting(
        None, "The adapters' scale is alpha / rank; default: 1.", bounds=(1, 1e6)
    )
    lora_targets: str = setting("all", "all, or qv (the paper's).", choices=("all", "qv"))
    compensation: bool = setting(True, "Re-fit projections in closed form when masks freeze.")
    sharded: bool = setting(False, "Share the dense model's weights out over processes.")
    offload: bool = setting(
        False,
        "Keep the dense model's layers in main memory or on disk; each comes to the device as it "
        "is needed.",
        option="--offload",
        flag=True,
        role=HOW,
    )

    # Of TrainingArguments: other defaults, or an option of their own.
    max_steps: int = setting(
        80,
        "Optimizer steps (default {default}; demo 60). 0 prunes without training.",
        bounds=(0, 1e9),
        option="--steps",
        role=HOW,
    )
    per_device_train_batch_size: int = setting(
        4,
        "Sequences per forward pass of each process (default {default}; demo 2, with 2 "
        "accumulated).",
        bounds=(1, 1e6),
        option="--batch-size",
        role=HOW,
    )
    learning_rate: float = setting(2e-3, "Learning rate of LoRA.", bounds=(1e-12, 1e3))
    lr_scheduler_type: SchedulerType | str = setting("polynomial", "How the learning rate falls.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = setting(
        None, "Settings of the schedule; power 0.5 for polynomial."
    )
    weight_decay: float = setting(0.01, "Of LoRA; gates have none.", bounds=(0, 1e3))
    max_grad_norm: float = setting(
        0.5, "Norm that LoRA's gradients are clipped to.", bounds=(1e-12, 1e12)
    )
    gradient_checkpointing: bool | None = setting(
        None, "Less memory, more time.", option="--gradient-checkpointing", flag=True, role=HOW
    )
    seed: int = setting(
        42, "Seed of everything random (default {default}).", bounds=(0, 2**31 - 1), option="--seed"
    )
    report_to: list[str] | str | None = setting(
        "none",
        "Trackers that follow the run: tensorboard, wandb, trackio or another of Trainer's, comma "
        "separated; install them yourself.",
        option="--report-to",
        role=CALL,
    )
    logging_steps: float = setting(1, "Steps between logs.", bounds=(1e-6, 1e9), role=HOW)
    logging_nan_inf_filter: bool = setting(False, "Hide NaN losses.", role=HOW)
    remove_unused_columns: bool = setting(False, "Drop columns.", role=HOW)

    FOLLOWING: ClassVar[Mapping[str, Any]] = {
        "lr_scheduler_kwargs": FALLS_LATE,
        "gradient_checkpointing": False,
        "activation_checkpointing": False,
    }

    def __post_init__(self) -> None:
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == SchedulerType.POLYNOMIAL:
            self.lr_scheduler_kwargs = dict(FALLS_LATE)
        super().__post_init__()
        check_kinds(self.gate_kinds or ())
        if self.for_quantization:
            self.neuron_multiple = lcm(self.neuron_multiple, SUPER_BLOCK)
            self.hidden_multiple = lcm(self.hidden_multiple, SUPER_BLOCK)
        if self.ddp_find_unused_parameters is None:  # frozen gates are unused
            self.ddp_find_unused_parameters = GATE_TYPES[self.gate_type].trained
        self._spell_targets()
        check_targets(self)
        check_combinations(self, METHOD)

    def _spell_targets(self) -> None:
        """Let a record say the same, however targets were spelled."""
        default = type(self).target_sparsity  # which says nothing
        given = {k: v for k, v in vars(self).items() if (k, v) != ("target_sparsity", default)}
        check_one(given, ["target_sparsity", *(x.setting for x in KINDS.values()), "shape"])
        targets = self.targets
        self.target_sparsity = targets[0] if len(targets) == 1 else list(targets)
        if (kind := KINDS.get(self.asked[0].kind)) is not None:
            told = [asked.text for asked in self.asked]
            setattr(self, kind.setting, told[0] if len(told) == 1 else told)

    @property
    def targets(self) -> tuple[float, ...]:
        """The sparsities to reach, growing, where it is sparsity that is asked for."""
        return sparsities(self.target_sparsity)

    @property
    def asked(self) -> tuple[Asked, ...]:
        """What is asked for, the largest model first; of a chosen shape what is left aside."""
        for name, kind in KINDS.items():
            if (given := getattr(self, kind.setting)) is not None:
                about: dict[str, dict[str, Any]] = {
                    "memory": {"context": self.context or 0, "sequences": self.sequences},
                    "speedup": {"for": self.speed_for, "at": self.speed_at},
                }
                more = about.get(name, {})
                return tuple(Asked(name, value, more) for value in several(name, given))
        return tuple(Asked("sparsity", value) for value in self.targets)

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of a target's steps by which it is reached, and masks are frozen."""
        ramp = GATE_TYPES[self.gate_type].ramp_share if self.ramp_share is None else self.ramp_share
        return ramp, ramp if self.freeze_share is None else self.freeze_share

    @property
    def staged(self) -> bool:
        """Whether targets, or a ramp, have shares of the steps."""
        return len(self.asked) > 1 or any(self.shares)

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
        lora_alpha: their scale is alpha / rank; None: 1.
        lora_dropout: share of the adapters' input that is dropped in training.
    """

    lora_rank: int = setting(8, "Rank of the adapters.", bounds=(1, 1e5))
    lora_alpha: int | None = setting(None, "Scale is alpha / rank; default: 1.", bounds=(1, 1e6))
    lora_dropout: float = setting(0.0, "Share of inputs dropped.", bounds=(0, 1))

    # Defaults of TrainingArguments that differ here.
    learning_rate: float = setting(1e-4, "Learning rate of LoRA.", bounds=(1e-12, 1e3))
    lr_scheduler_type: SchedulerType | str = setting("linear", "How the learning rate falls.")
    per_device_train_batch_size: int = setting(8, "Sequences per step.", bounds=(1, 1e6), role=HOW)
    logging_steps: float = setting(1, "Steps between logs.", role=HOW)
    logging_nan_inf_filter: bool = setting(False, "Hide NaN losses.", role=HOW)
    remove_unused_columns: bool = setting(False, "Drop columns.", role=HOW)
