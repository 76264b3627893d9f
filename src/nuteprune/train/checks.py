"""What settings may be: choices, bounds, what goes together, and what no run of ours can do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from nuteprune.distill.losses import LAYER_TERMS
from nuteprune.errors import UserError
from nuteprune.gates.importance import METHODS
from nuteprune.model.families import GATE_KINDS

if TYPE_CHECKING:
    from nuteprune.train.config import NutePruneConfig

NUTEPRUNE = "nuteprune"
"""The method that learns its masks; the others of `METHODS` score once."""
GATE_TYPES = {"ranked": 0.0, "hard_concrete": 0.5, "deterministic": 0.5}
"""Type of gates -> `ramp_share` by default: soft ones need steps to learn in, and a ranking is best
followed at once (docs/quality.md)."""
ASCENDING = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Values of `optim` that know `maximize`."""
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""How `accelerate launch` asks for it, whatever the settings say."""
SHAPES = ("free", "uniform")
TEACHERS = ("numerous", "dense", "none")
LORA_TARGETS = ("all", "qv")
COMPENSATION = ("none", "start", "finalize")
CHOICES: dict[str, Sequence[str]] = {
    "method": (NUTEPRUNE, *METHODS),
    "importance": tuple(METHODS),
    "gate_type": tuple(GATE_TYPES),
    "shapes": SHAPES,
    "teachers": TEACHERS,
    "layer_term": tuple(LAYER_TERMS),
    "lora_targets": LORA_TARGETS,
    "compensation": COMPENSATION,
}
"""What settings with names for values may be."""
BOUNDS: dict[str, tuple[float, float]] = {
    "max_steps": (0, 1e9),
    "per_device_train_batch_size": (1, 1e6),
    "gradient_accumulation_steps": (1, 1e6),
    "save_steps": (1e-6, 1e9),
    "logging_steps": (1e-6, 1e9),
    "warmup_steps": (0, 1e9),
    "dataloader_num_workers": (0, 1024),
    "seed": (0, 2**31 - 1),
    "learning_rate": (1e-12, 1e3),
    "weight_decay": (0, 1e3),
    "max_grad_norm": (1e-12, 1e12),
    "adam_beta1": (0, 1 - 1e-9),
    "adam_beta2": (0, 1 - 1e-9),
    "adam_epsilon": (0, 1),
    "neuron_multiple": (1, 1e6),
    "hidden_multiple": (1, 1e6),
    "calibration_blocks": (1, 1e6),
    "compensation_blocks": (1, 1e6),
    "ramp_share": (0, 1),
    "freeze_share": (0, 1),
    "ramp_power": (1e-3, 1e3),
    "score_decay": (0, 1),
    "gate_learning_rate": (0, 1e3),
    "token_weight": (0, 1e6),
    "layer_weight": (0, 1e6),
    "kd_temperature": (1e-3, 1e3),
    "lm_weight": (0, 1e6),
    "lora_rank": (1, 1e5),
    "lora_alpha": (1, 1e6),
    "max_bad_steps": (1, 1e9),
}
"""Smallest and largest value of numbers."""


def check_choices(args: NutePruneConfig) -> None:
    """Refuse values that are none of those a setting may have; other settings follow from them.

    Raises:
        UserError: naming the setting.
    """
    for name, known in CHOICES.items():
        value = getattr(args, name)
        if value not in known:
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    for kind in args.gate_kinds or ():
        if kind not in GATE_KINDS:
            raise UserError(f"{kind!r} is not a kind of gate; known kinds: {', '.join(GATE_KINDS)}")


def check_values(args: NutePruneConfig) -> None:
    """Refuse numbers out of bounds, and settings that do not go together.

    Raises:
        UserError: naming the setting.
    """
    _check_bounds(args)
    _check_targets(args)
    _check_combinations(args)


def _check_bounds(args: NutePruneConfig) -> None:
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name)
        if not low <= value <= high:  # nor is it a number if it compares with none
            raise UserError(f"{name} is {value}; it must lie between {low:g} and {high:g}")


def _check_targets(args: NutePruneConfig) -> None:
    if not 0 < args.target_sparsity < 1:
        raise UserError(
            f"sparsity is {args.target_sparsity}; it is a share, so it must lie between 0 "
            "and 1, both excluded (0.2 removes 20 %)"
        )
    targets = args.targets
    if any(not 0 < a < b for a, b in pairwise(targets)):
        raise UserError(
            f"targets are {', '.join(f'{t:g}' for t in targets)}; they must grow, between 0 and 1"
        )
    if len(targets) > 1 and args.max_steps < len(targets):
        raise UserError(
            f"{len(targets)} targets need at least {len(targets)} steps, one for each; "
            f"max_steps is {args.max_steps}"
        )


def _check_combinations(args: NutePruneConfig) -> None:
    if args.one_shot and args.gate_type != "ranked":
        raise UserError(
            f"method {args.method} keeps its one-shot masks, so gate_type {args.gate_type} has "
            f"nothing to learn: leave it out, or use method {NUTEPRUNE} with "
            f"importance={args.method}"
        )
    if args.fp16:
        raise UserError(
            "fp16 with loss scaling is not supported: use bf16, or load the model in the dtype "
            "to compute in (--dtype)"
        )
    if args.lora_targets == "qv" and args.compensation == "start":
        raise UserError(
            "the re-fit before training starts LoRA of the output and down projections, which "
            "lora_targets qv leaves without: set compensation to finalize or none"
        )
    lagrangian = args.gate_type != "ranked" and not args.solved_schedule
    if lagrangian and OptimizerNames(args.optim).value not in ASCENDING:
        raise UserError(
            f"the Lagrangian's multipliers ascend, which optim "
            f"{OptimizerNames(args.optim).value} cannot do: leave optim out, or set "
            "solved_schedule"
        )
    if args.teachers == "none" and args.lm_weight <= 0:
        raise UserError("without teachers there is no loss left: set lm_weight above 0")


def check_whole(args: TrainingArguments) -> None:
    """Refuse Trainer's own sharding: on CPU it would silently be DDP, and it knows no two roles.

    Raises:
        UserError: if settings or the launcher ask for it.
    """
    if args.fsdp or args.deepspeed or any(map(parse_flag_from_env, SHARDING)):
        raise UserError(
            "fsdp and deepspeed are not supported: leave them out, of accelerate's config too; "
            "pruning shares weights out over processes by the setting sharded"
        )


def check_shards(args: NutePruneConfig, packed: bool) -> None:
    """Refuse to share weights out where that cannot be done.

    Raises:
        UserError: with one process, or for weights in 8 or 4 bits.
    """
    if args.sharded and args.world_size < 2:
        raise UserError(
            "sharded shares weights out over several processes: start them with torchrun or "
            "accelerate launch, or leave it out"
        )
    if args.sharded and packed:
        raise UserError("weights in 8 or 4 bits cannot be sharded: leave out one of the two")


def check_trainer_settings(args: TrainingArguments) -> None:
    """Refuse what no run of ours can do, and keep each process to one accelerator.

    Trainer would spread a process over all that it sees (DataParallel), but hooks and masks belong
    to one copy of the model; several processes are what several are for.

    Raises:
        UserError: naming the setting.
    """
    if args.load_best_model_at_end:
        raise UserError(
            "load_best_model_at_end is not supported: checkpoints of a run are not models; leave "
            "it out"
        )
    if args.label_smoothing_factor:
        raise UserError(
            f"label_smoothing_factor is {args.label_smoothing_factor}, and no loss here smooths "
            "labels: leave it out"
        )
    if args.use_liger_kernel:
        raise UserError(
            "use_liger_kernel patches the model's own forward passes, which masks and two roles "
            "have never been tested with: leave it out"
        )
    if args.n_gpu > 1:
        args._n_gpu = 1
