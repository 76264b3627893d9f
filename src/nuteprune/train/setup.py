"""What a run's settings make of a model: its allocator, its gates, its LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from torch import Tensor

from nuteprune.errors import UserError
from nuteprune.export.config import pruned_config
from nuteprune.gates.allocate import Allocator, Constraints
from nuteprune.gates.budget import Budget
from nuteprune.gates.gates import Gates, RankedGates
from nuteprune.gates.importance import check_kinds
from nuteprune.gates.multipliers import DeterministicGates
from nuteprune.gates.soft import HardConcreteGates
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.shape import Shape, kinds_of_cut
from nuteprune.train.checks import GATE_TYPES
from nuteprune.train.config import FALLS_LATE, NutePruneConfig


def make_allocator(anatomy: Anatomy, args: NutePruneConfig) -> Allocator:
    """Return the allocator for a model under a run's constraints.

    Raises:
        UserError: for gates that the model's family cannot take, and for dimensions chosen that
            the model or the gates cannot be cut to.
    """
    floor = _chosen_shape(anatomy.shape, args)
    needed = _kinds_here(anatomy.shape, kinds_of_cut(anatomy.shape, floor)) if floor else ()
    asked = needed if needed and not args.gates else args.gate_kinds
    kinds = _kinds_here(anatomy.shape, asked or ("kv_groups", "neurons"))
    if set(needed) - set(kinds):
        raise UserError(
            f"gates on {', '.join(kinds)} cannot cut to the shape; it needs {', '.join(needed)}"
        )
    check_kinds(args.scoring, kinds)
    for kind in kinds:
        reason = anatomy.family.refusal(kind, uniform=args.shapes == "uniform")
        if reason:
            raise UserError(f"gates on {kind} cannot be used here: {reason}")
    constraints = Constraints(
        kinds, args.shapes == "uniform", args.neuron_multiple, args.hidden_multiple, floor
    )
    return Allocator(Budget.of(anatomy), constraints)


def check_stock(anatomy: Anatomy, allocator: Allocator, target: float) -> None:
    """Refuse uniform shapes that this checkpoint's stock config would not take.

    Raises:
        UserError: naming what works.
    """
    if not allocator.constraints.uniform:
        return
    trial = allocator.shape(allocator.equal_scores(), target)
    config, family = anatomy.config, anatomy.family
    if pruned_config(config, family, trial).model_type != family.model_type:
        raise UserError(
            f"this checkpoint's config cannot state other heads or another width (its "
            f"{type(config).__name__} refuses them, as with long rope), so uniform shapes would be "
            "of no stock class: use --gates neurons, or --shapes free"
        )


def _chosen_shape(whole: Shape, args: NutePruneConfig) -> Shape | None:
    """Return the dimensions that the user chose, checked; None if it is by a target."""
    if args.shape is None:
        return None
    if not isinstance(args.shape, Mapping):
        raise UserError(f"shape is {args.shape!r}; it must map names to counts")
    floor = whole.cut_to(args.shape)
    if floor == whole:
        raise UserError("the shape keeps everything: name fewer heads, neurons or width")
    if args.shapes == "uniform" and not floor.uniform:
        raise UserError("shapes are to be uniform, and the one chosen is not; use --shapes free")
    return floor


def _kinds_here(whole: Shape, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Return kinds under the names that they have in a model: a group of one head is a head."""
    if any(layer.heads_per_group > 1 for layer in whole.layers):
        return kinds
    return tuple(dict.fromkeys("heads" if kind == "kv_groups" else kind for kind in kinds))


def run_targets(allocator: Allocator, args: NutePruneConfig) -> tuple[float, ...]:
    """Return the sparsities that a run is to reach, growing.

    Raises:
        UserError: if one is out of the gates' reach.
    """
    floor = allocator.constraints.floor
    targets = (allocator.budget.sparsity(floor),) if floor else args.targets
    allocator.shape(allocator.equal_scores(), targets[-1])
    return targets


def make_gates(allocator: Allocator, scores: Mapping[str, Tensor], args: NutePruneConfig) -> Gates:
    """Return gates of the run's type that start from scores."""
    if args.gate_type == "ranked":
        return RankedGates(allocator, scores, 1.0 if args.one_shot else args.score_decay)
    if args.gate_type == "hard_concrete":
        return HardConcreteGates(allocator, scores, args.warm_start, args.solved_schedule)
    target = run_targets(allocator, args)[-1]
    return DeterministicGates(allocator, scores, target, args.warm_start, args.solved_schedule)


def lora_config(anatomy: Anatomy, args: NutePruneConfig) -> LoraConfig:
    """Return PEFT's settings: adapters on all projections, or on those that make Q and V."""
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules=anatomy.lora_targets(args.lora_targets == "qv"),
        task_type="CAUSAL_LM",
    )


NOT_ON_RECORD = {
    "output_dir",
    "disable_tqdm",
    "use_cpu",
    "logging_dir",
    "report_to",
    "debug",
    "dataloader_pin_memory",
    "accelerator_config",
    "ddp_find_unused_parameters",  # follows from the type of gates
    "hub_token",  # a secret
    "sharded",
}
"""Settings that change no result, or that are nobody else's business."""


def chosen_settings(args: NutePruneConfig) -> dict[str, Any]:
    """Return the settings that are not defaults, as far as they are for the record."""
    # Another config made for comparison would reset what accelerate knows of this process.
    left_open = {
        "ramp_share": GATE_TYPES[args.gate_type],
        "freeze_share": args.ramp_share,
        "lr_scheduler_kwargs": FALLS_LATE,
        "gradient_checkpointing": False,
        "activation_checkpointing": False,
    }
    found = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        default = left_open.get(field.name, field.default)
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.init and field.name not in NOT_ON_RECORD and value not in (default, None):
            found[field.name] = value
    return found
