"""Turns targets into goals of the allocator: costs in parameters, bytes or seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from nuteprune.console import megabytes, millions
from nuteprune.errors import RunFailed, UserError
from nuteprune.export.checkpoint import header_bytes
from nuteprune.files import at_home
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.budget import Budget
from nuteprune.gates.costs import MEASURE, Cost, Goal, Seconds, Uncounted, seconds_of
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.shape import Shape
from nuteprune.model.weights import count
from nuteprune.train.asked import DECODE, Asked
from nuteprune.train.config import NutePruneConfig

IN_PARAMETERS = ("params", "active_params")
"""Kinds of targets in parameters."""
COUNTED = (*IN_PARAMETERS, "size", "memory")
"""Kinds of targets that files can be held to; speed is measured."""


@dataclass(frozen=True)
class Target:
    """The target of one checkpoint of a run.

    Args:
        asked: the target as the user gave it.
        goal: the same for the allocator.
        sparsity: the one asked for, or an estimate from before units are scored.
    """

    asked: Asked
    goal: Goal
    sparsity: float

    def record(self, sparsity: float, cache_bytes: int) -> dict[str, Any]:
        """Return the record's entries on the target.

        Args:
            sparsity: the checkpoint's.
            cache_bytes: of its KV cache, at the context that was asked for.
        """
        asked = {"kind": self.asked.kind, "value": self.asked.value, **self.asked.about}
        if self.asked.kind == "memory":
            asked["cache_bytes"] = cache_bytes
        share = self.asked.kind in ("sparsity", "shape")
        return {"target": self.sparsity if share else sparsity, "asked": asked}


@dataclass(frozen=True)
class Prices:
    """The costs of a model of any shape.

    Args:
        params: in parameters, tied ones once.
        active_params: in those that a token goes through.
        size: in bytes of the file, at most.
        memory: the same with the KV cache.
        context: tokens of each sequence's cache.
        sequences: sequences at a time.
        seconds: in seconds, where a table of costs is given.
    """

    params: Cost
    active_params: Cost
    size: Cost
    memory: Cost
    context: int
    sequences: int
    seconds: Seconds | None = None

    @classmethod
    def of(cls, anatomy: Anatomy, dtype: torch.dtype, args: NutePruneConfig) -> Prices:
        """Return the prices of a live model that is stored in a dtype."""
        allowed = getattr(anatomy.config, "max_position_embeddings", None)
        about = args.asked[0].about
        context, sequences = about.get("context") or allowed or 2048, about.get("sequences", 1)
        params = Cost(Budget.of(anatomy), Uncounted.of(anatomy))
        tensors = {name: (list(p.shape), count(p)) for name, p in anatomy.model.named_parameters()}
        stored = tuple(f".{path}" for path in anatomy.family.buffers)
        buffers = {k: x for k, x in anatomy.model.named_buffers() if k.endswith(stored)}
        tensors |= {name: (list(x.shape), x.numel()) for name, x in buffers.items()}
        header = header_bytes(tensors, dtype) + sum(x.nbytes for x in buffers.values())
        size = Cost(params.budget, params.outside, dtype.itemsize, fixed=header)
        token = anatomy.cached_features * dtype.itemsize * sequences
        cached = tuple(round(token * tokens) for tokens in anatomy.cached_tokens(context))
        memory = Cost(params.budget, params.outside, dtype.itemsize, cached, header)
        seconds = None
        if args.costs is not None:
            table = args.costs if isinstance(args.costs, Mapping) else read_table(args.costs)
            seconds = seconds_of(table, params.budget, about.get("for", DECODE))
        active = replace(params, active=True)
        return cls(params, active, size, memory, context, sequences, seconds)

    def cache(self, shape: Shape) -> int:
        """Return the bytes of the KV cache of a model of a shape."""
        pairs = zip(self.memory.kv_head, shape.layers, strict=True)
        return sum(each * layer.kv_heads for each, layer in pairs)

    def of_a_token(self, shape: Shape) -> dict[str, int]:
        """Return what a record says of parameters that a token goes through, {} if through all."""
        cost, whole = self.active_params, self.active_params.budget.shape
        if not cost.budget.idle(whole):
            return {}
        return {"active_before": int(cost.total(whole)), "active_after": int(cost.total(shape))}

    def goal(self, asked: Asked) -> Goal:
        """Return the goal for a target in parameters, bytes or speed."""
        if asked.kind == "speedup":
            if self.seconds is None:
                raise UserError(f"{asked} needs a table of costs: run {MEASURE}")
            before = self.seconds.total(self.seconds.budget.shape)

            def fastest(least: float) -> str:
                return f"make it at most {math.floor(100 * before / least) / 100:.2f} x as fast"

            return Goal(self.seconds, before / asked.value, str(asked), fastest, "ask for less")
        cost: Cost = getattr(self, asked.kind)

        def reach(least: float) -> str:
            return f"leave at least {self.told(asked.kind, _rounded_up(least))}"

        return Goal(cost, asked.value, str(asked), reach, "ask for more")

    def speedup(self, shape: Shape) -> float | None:
        """Return how many times as fast a model of a shape is expected to be; None: not known."""
        if self.seconds is None:
            return None
        return self.seconds.total(self.seconds.budget.shape) / self.seconds.total(shape)

    def told(self, kind: str, value: float) -> str:
        """Return a model's size in the unit of a target, as text."""
        if kind in IN_PARAMETERS:
            each = " a token goes through" * (kind == "active_params")
            return f"{millions(value)} parameters{each}"
        cache = f" with the KV cache of {self.sequences} x {self.context} tokens"
        return megabytes(value) + cache * (kind == "memory")


def _rounded_up(value: float) -> float:
    """Round parameters or bytes up to three digits, as a user would ask for them."""
    unit = 10 ** max(0, math.floor(math.log10(value)) - 2)
    return float(math.ceil(value / unit) * unit)


def read_table(path: str) -> dict[str, Any]:
    """Return the content of a table of costs.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        table = json.loads(at_home(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --costs {path}: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"--costs {path} is no table of costs: nuteprune bench writes one")
    return table


def run_targets(allocator: Allocator, args: NutePruneConfig, prices: Prices) -> tuple[Target, ...]:
    """Return the targets of a run, sparsities growing.

    Raises:
        UserError: if one is out of the gates' reach, or asks for no cut.
    """
    floor = allocator.constraints.floor
    if floor:
        share = allocator.budget.sparsity(floor)
        found = [Target(Asked("shape", share), allocator.goal(share), share)]
    elif args.asked[0].kind == "sparsity":
        found = [Target(x, allocator.goal(x.value), x.value) for x in args.asked]
    else:
        found = [_target(allocator, x, prices) for x in args.asked]
    allocator.shape(allocator.equal_scores(), found[-1].goal)
    for a, b in pairwise(found):
        if a.sparsity >= b.sparsity:
            raise UserError(f"{a.asked} and {b.asked} come to the same model: ask for one of them")
    return tuple(found)


def _target(allocator: Allocator, asked: Asked, prices: Prices) -> Target:
    """Return a target in parameters or bytes, with its sparsity under random scores."""
    goal = prices.goal(asked)
    before = goal.cost.total(allocator.budget.shape)
    if before <= goal.limit:
        raise UserError(
            f"{asked} is no less than what the model has, {prices.told(asked.kind, before)}: "
            "nothing is to go; ask for less"
        )
    shape = allocator.shape(allocator.chance_scores(), goal)
    return Target(asked, goal, allocator.budget.sparsity(shape))


def reached(record: Mapping[str, Any]) -> float:
    """Return what a checkpoint's files come to, in the unit of its target.

    Args:
        record: its nuteprune.json.
    """
    asked = record["asked"]
    return float(
        {
            "params": record["params"]["after"],
            "active_params": record["params"].get("active_after", record["params"]["after"]),
            "size": record["bytes_on_disk"],
            "memory": record["bytes_on_disk"] + asked.get("cache_bytes", 0),
        }.get(asked["kind"], record["sparsity"])
    )


def check_reached(record: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that misses its target.

    Raises:
        RunFailed: if a target was missed; it says by how much.
    """
    if record["sparsity"] < record["target"] - 1e-9:  # the division rounds
        raise RunFailed(
            f"the target was missed: {record['sparsity']:.2%} of {record['target']:.2%}"
        )
    asked = record["asked"]
    if asked["kind"] in COUNTED and reached(record) > asked["value"]:
        raise RunFailed(
            f"the target was missed: {reached(record):.0f} where {asked['kind']} was to be "
            f"{asked['value']:.0f} at most"
        )
