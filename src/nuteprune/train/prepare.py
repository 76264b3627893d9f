"""A dense model made ready for a run: LoRA and gates on it, hooks in it, teachers beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import set_seed

from nuteprune.distill.coforward import CoForward
from nuteprune.distill.objective import OBJECTIVES, TEXT, Objective
from nuteprune.distill.teachers import Plan, Teachers, kind_met
from nuteprune.export.record import origin_of, read_record
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.gates import Gates
from nuteprune.gates.schedule import Schedule
from nuteprune.model.anatomy import Anatomy, silence_dropout
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.offload import offload
from nuteprune.model.packed import is_packed, make_trainable
from nuteprune.model.sharding import all_processes, shard_base
from nuteprune.run_folder import RECORD, TEACHERS
from nuteprune.train.averaging import leave_out
from nuteprune.train.checks import check_checkpointing, check_offload, check_shards, check_whole
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.setup import check_stock, make_allocator, make_gates, with_lora
from nuteprune.train.targets import Prices, Target, run_targets


@dataclass(frozen=True)
class Origin:
    """What is known of the dense model, which a run uses up.

    Args:
        parameters: all of it, tied ones once.
        entries: what a record says of where it comes from; see `export.record.origin_of`.
        stored_dtype: of the checkpoint that it is from, which the result keeps.
        computed_dtype: of the model itself.
    """

    parameters: int
    entries: Mapping[str, Any]
    stored_dtype: torch.dtype
    computed_dtype: torch.dtype

    @classmethod
    def of(cls, dense: Anatomy, stored_dtype: torch.dtype | None = None) -> Origin:
        """Look at a model before anything is changed in it.

        Args:
            dense: the model.
            stored_dtype: of its checkpoint; None: the model's own.
        """
        name = dense.config._name_or_path
        pruned_before = bool(name) and (Path(name) / RECORD).is_file()
        earlier = read_record(Path(name)) if pruned_before else None
        return cls(
            dense.parameters(),
            origin_of(name or None, earlier),
            stored_dtype or dense.model.dtype,
            dense.embedding.weight.dtype,
        )


@dataclass(frozen=True)
class Prepared:
    """A model with all that a run hangs on it.

    Args:
        origin: what it was.
        model: the dense model with LoRA and gates.
        anatomy: its parts.
        hooks: where masks multiply in it.
        coforward: the two roles that it plays.
        allocator: which shapes it can be cut to.
        prices: what a model of any shape costs.
        goals: what it is to become, the largest first.
        schedule: when it reaches them.
        plan: which teacher serves when.
        teachers: none yet.
        gates: all units alike as yet.
        objective: what it is trained on.
    """

    origin: Origin
    model: PeftModel
    anatomy: Anatomy
    hooks: MaskHooks
    coforward: CoForward
    allocator: Allocator
    prices: Prices
    goals: tuple[Target, ...]
    schedule: Schedule
    plan: Plan
    teachers: Teachers
    gates: Gates
    objective: Objective

    @property
    def targets(self) -> tuple[float, ...]:
        """The sparsities that it is to reach, growing."""
        return tuple(target.sparsity for target in self.goals)

    @property
    def met(self) -> list[float]:
        """Sparsities of the teachers on the way; models of earlier targets may be kept besides."""
        return self.teachers.sparsities if self.plan.kind == "numerous" else []

    def target(self, sparsity: float) -> Target:
        """Return the target of one of `targets`."""
        return self.goals[self.targets.index(sparsity)]


def offload_if_asked(anatomy: Anatomy, args: NutePruneConfig, origin: Origin) -> None:
    """Let the frozen layers of a run's model, dense or pruned, stay off its device.

    Args:
        anatomy: the model.
        args: the run's settings, which may ask for it.
        origin: what is known of the dense model.
    """
    if not args.offload:
        return
    # Else the checkpoint's own files stand behind them.
    converted = origin.computed_dtype != origin.stored_dtype
    on_disk = converted and args.device.type == "cpu"
    offload(anatomy, args.device, Path(cast(str, args.output_dir)) if on_disk else None)


def prepare(
    model: PreTrainedModel, args: NutePruneConfig, stored_dtype: torch.dtype | None = None
) -> Prepared:
    """Wrap a dense model for a run.

    Args:
        model: a dense causal LM; it is changed in place.
        args: the run's settings.
        stored_dtype: of the checkpoint that it is from; None: the model's own.

    Raises:
        UserError: for an unsupported model, gates that its family cannot take, a target out of the
            gates' reach, or what no run can do; before anything is changed.
    """
    check_whole(args)
    check_offload(args, is_packed(model))
    check_shards(args.sharded, args.world_size, is_packed(model))
    check_checkpointing(model, args)
    make_trainable(model)
    dense = Anatomy(model)
    origin = Origin.of(dense, stored_dtype)
    allocator = make_allocator(dense, args)
    # Fails early, before the model is touched, if a target is out of reach.
    prices = Prices.of(dense, origin.stored_dtype, args)
    goals = run_targets(allocator, args, prices)
    targets = tuple(target.sparsity for target in goals)
    check_stock(dense, allocator, goals[-1].goal)
    model.requires_grad_(False)
    silence_dropout(model)
    set_seed(args.seed)  # LoRA starts from random values
    peft_model = with_lora(dense, args)
    anatomy = Anatomy(peft_model)
    hooks = MaskHooks(anatomy)
    objective = TEXT if args.teachers == "none" else OBJECTIVES[args.objective]
    run, keep = Path(cast(str, args.output_dir)), args.device.type != "cpu"
    distance, normed = objective.layer_distance, objective.normed
    coforward = CoForward(anatomy, hooks, distance, run, normed)
    ramp, freeze = args.shares
    schedule = Schedule(targets, args.max_steps, ramp, freeze)
    kind = kind_met(args.teachers, schedule)
    gates = make_gates(allocator, allocator.equal_scores(), args)
    peft_model.add_module("nuteprune_gates", gates)
    if args.sharded:
        shard_base(anatomy, all_processes(args.device))
    leave_out(peft_model)
    offload_if_asked(anatomy, args, origin)
    return Prepared(
        origin=origin,
        model=peft_model,
        anatomy=anatomy,
        hooks=hooks,
        coforward=coforward,
        allocator=allocator,
        prices=prices,
        goals=goals,
        schedule=schedule,
        plan=Plan.for_target(targets[-1], schedule.ramp_steps, kind),
        teachers=Teachers(run / TEACHERS, allocator.layout, keep),
        gates=gates,
        objective=objective,
    )
