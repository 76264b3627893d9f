"""What a run's settings make of a model: its allocator, its gates, its LoRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig
from torch import Tensor

from nuteprune.errors import UserError
from nuteprune.gates.allocate import Allocator, Constraints
from nuteprune.gates.budget import Budget
from nuteprune.gates.gates import Gates, HardConcreteGates, RankedGates
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.shape import kinds_of_cut
from nuteprune.train.config import NutePruneConfig


def make_allocator(anatomy: Anatomy, args: NutePruneConfig) -> Allocator:
    """Return the allocator for a model under a run's constraints.

    Raises:
        UserError: for gates that the model's family cannot take.
    """
    shape = anatomy.shape
    grouped = any(x.heads_per_group > 1 for x in shape.layers)
    floor = None
    if args.shape is not None:
        if not isinstance(args.shape, Mapping):
            raise UserError(f"shape is {args.shape!r}; it must map names to counts")
        floor = shape.cut_to(args.shape)
    default = kinds_of_cut(shape, floor) if floor else ("kv_groups", "neurons")
    kinds = args.gate_kinds or default
    if not grouped:
        kinds = tuple(dict.fromkeys("heads" if k == "kv_groups" else k for k in kinds))
    for kind in kinds:
        reason = anatomy.family.refusal(kind, uniform=args.shapes == "uniform")
        if reason:
            raise UserError(f"gates on {kind} cannot be used here: {reason}")
    constraints = Constraints(
        kinds, args.shapes == "uniform", args.neuron_multiple, args.hidden_multiple, floor
    )
    return Allocator(Budget.of(anatomy), constraints)


def run_targets(allocator: Allocator, args: NutePruneConfig) -> tuple[float, ...]:
    """Return the sparsities that a run is to reach, growing.

    Raises:
        UserError: if one is out of the gates' reach, or the dimensions chosen remove nothing.
    """
    floor = allocator.constraints.floor
    if floor is None:
        targets = args.targets
    else:
        targets = (allocator.budget.sparsity(floor),)
        if not targets[0] > 0:
            raise UserError("the shape keeps all that counts: name fewer heads, neurons or width")
    ones = {k: torch.ones(allocator.layout.units(k)) for k in allocator.constraints.kinds}
    reached = allocator.shape(ones, targets[-1])
    if floor is not None and reached != floor:
        raise UserError(
            f"gates on {', '.join(allocator.constraints.kinds)} cannot cut to that shape; it needs "
            f"{', '.join(kinds_of_cut(allocator.budget.shape, floor))}"
        )
    return targets


def make_gates(allocator: Allocator, scores: Mapping[str, Tensor], args: NutePruneConfig) -> Gates:
    """Return gates of the run's type that start from scores."""
    if args.gate_type == "ranked":
        return RankedGates(allocator, scores, args.score_decay)
    return HardConcreteGates(allocator, scores, args.warm_start, args.solved_schedule)


def lora_config(anatomy: Anatomy, args: NutePruneConfig) -> LoraConfig:
    """Return PEFT's settings: adapters on all projections, or on those that make Q and V."""
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules=anatomy.lora_targets(args.lora_targets == "qv"),
        task_type="CAUSAL_LM",
    )
