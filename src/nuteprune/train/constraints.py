"""Which gates a run has, and which shapes it may end at: what its settings ask of the allocator."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import filterfalse

from nuteprune.errors import UserError
from nuteprune.export.config import pruned_config
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.allowed_shapes import Constraints
from nuteprune.gates.budget import Budget
from nuteprune.gates.costs import Goal
from nuteprune.gates.importance import check_scorable
from nuteprune.gates.masks import Layout
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import BLOCK_KINDS, GATE_KINDS
from nuteprune.model.shape import Shape, kinds_of_cut
from nuteprune.model.weights import is_packed
from nuteprune.train.config import NutePruneConfig

DEFAULT_KINDS = ("kv_groups", "neurons")
"""Kinds of gates where none are named, as far as the family takes them."""
MIXTURE_KINDS = ("experts",)
"""The same of a mixture of experts, most of whose weights are theirs."""
STACK_MULTIPLE = 8
"""Sizes of stacked experts are multiples of it, as the kernel for them needs in bfloat16."""


def make_allocator(anatomy: Anatomy, args: NutePruneConfig) -> Allocator:
    """Return the allocator for a model under a run's constraints.

    Raises:
        UserError: for gates that the model's family cannot take, for dimensions that the model or
            the gates cannot be cut to, or for a term of routers in a model without any.
    """
    whole, speed = anatomy.shape, args.asked[0].kind == "speedup"
    mixture = any(layer.experts for layer in whole.layers)
    _check_mixture(anatomy, mixture, speed)
    floor = _chosen_shape(anatomy, args)
    needed = _kinds_here(whole, kinds_of_cut(whole, floor)) if floor else ()
    asked = needed if needed and not args.gates else args.gate_kinds
    refused = partial(_refusal, anatomy, uniform=args.shapes == "uniform")
    usual: tuple[str, ...] = DEFAULT_KINDS
    if speed:  # where calls cost, not bytes
        usual += BLOCK_KINDS
    if mixture:
        usual = ("expert_neurons",) if refused("experts") else MIXTURE_KINDS
    kinds = _kinds_here(whole, asked or tuple(filterfalse(refused, usual)))
    if speed and "hidden" in kinds:
        raise UserError(
            "a table of costs is of blocks at one width: for a speedup leave hidden out of --gates"
        )
    if not kinds:
        why = next(filter(None, map(refused, usual)), "the model has none left to cut")
        raise UserError(f"no gates can be used here: {why}")
    if set(needed) - set(kinds):
        raise UserError(
            f"gates on {', '.join(kinds)} cannot cut to the shape; it needs {', '.join(needed)}"
        )
    _check_kinds(anatomy, args, kinds, floor)
    others = _others(anatomy, args, kinds, floor)
    unstated = _unstated_widths(anatomy, args, floor) if "hidden" in kinds else frozenset()
    uniform, multiples = args.shapes == "uniform", (args.neuron_multiple, args.hidden_multiple)
    constraints = Constraints(kinds, uniform, *multiples, floor, unstated, others)
    return Allocator(Budget.of(anatomy), constraints)


def _check_kinds(
    anatomy: Anatomy, args: NutePruneConfig, kinds: tuple[str, ...], floor: Shape | None
) -> None:
    """Refuse kinds of gates that a run cannot have.

    Raises:
        UserError: naming the first of them, and why.
    """
    check_scorable(args.method, kinds)
    layout = Layout(anatomy.shape, anatomy.head_dim)
    for kind in kinds:
        reason = _refusal(anatomy, kind, args.shapes == "uniform")
        if reason is None and not layout.units(kind):
            reason = "the model has none left to cut"
        if reason:
            raise UserError(f"gates on {kind} cannot be used here: {reason}")
    _check_rows_of_stacks(anatomy, args, kinds, floor)
    if args.for_quantization:
        from nuteprune.export.gguf.rows import check_super_blocks

        check_super_blocks(anatomy.shape, anatomy.head_dim, kinds)


def _others(
    anatomy: Anatomy, args: NutePruneConfig, kinds: tuple[str, ...], floor: Shape | None
) -> tuple[str, ...]:
    """Return the kinds of gates that could be added to those of a run."""
    found = []
    for kind in GATE_KINDS:
        if kind not in kinds and _kinds_here(anatomy.shape, (kind,)) == (kind,):
            with suppress(UserError):
                _check_kinds(anatomy, args, (*kinds, kind), floor)
                found.append(kind)
    return tuple(found)


def _check_mixture(anatomy: Anatomy, mixture: bool, speed: bool) -> None:
    """Refuse mixtures in a form, or with a target, that they cannot have.

    Raises:
        UserError: saying which to leave out.
    """
    if speed and mixture:
        raise UserError(
            "a speedup is asked for, and a table of costs is of dense blocks, not of a mixture of "
            "experts: use --sparsity, --params or --active-params"
        )
    if anatomy.per_token and is_packed(anatomy.model):
        raise UserError(
            "the model is a mixture of experts in 8 or 4 bits, and stacked experts are not cut in "
            "that form: leave out --bits, or pass a checkpoint that is not quantised"
        )


def _refusal(anatomy: Anatomy, kind: str, uniform: bool) -> str | None:
    """Return why gates of a kind cannot be used on a model, None if they can."""
    if kind == "experts" and anatomy.groups > 1:
        return (
            f"its routers choose among {anatomy.groups} groups of experts first, which would have "
            "to stay whole; use --gates expert_neurons"
        )
    return anatomy.family.refusal(kind, uniform=uniform)


def _check_rows_of_stacks(
    anatomy: Anatomy, args: NutePruneConfig, kinds: tuple[str, ...], floor: Shape | None
) -> None:
    """Refuse sizes at which torch cannot multiply stacked experts.

    Raises:
        UserError: naming a multiple that will do.
    """
    multiples = {"expert_neurons": "neuron_multiple", "hidden": "hidden_multiple"}
    for kind, name in multiples.items() if anatomy.per_token else ():
        sizes = [floor.hidden, *(x.expert_neurons for x in floor.layers)] if floor else []
        wrong = [size for size in (getattr(args, name), *sizes) if size % STACK_MULTIPLE]
        if kind in kinds and wrong:
            raise UserError(
                f"experts of {wrong[0]} cannot be multiplied together: rows of a stack are whole "
                f"multiples of 16 bytes; pass {name} and counts as multiples of {STACK_MULTIPLE}"
            )


def check_stock(anatomy: Anatomy, allocator: Allocator, target: float | Goal) -> None:
    """Refuse uniform shapes that this checkpoint's stock config cannot state.

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


def _unstated_widths(
    anatomy: Anatomy, args: NutePruneConfig, floor: Shape | None
) -> frozenset[int]:
    """Return the widths that the model's config cannot state, as with long rope.

    Raises:
        UserError: if the width that the user chose is one.
    """
    whole, found = anatomy.shape, set()
    chosen = {floor.hidden} - {whole.hidden} if floor else set()
    for width in chosen or range(args.hidden_multiple, whole.hidden, args.hidden_multiple):
        try:
            pruned_config(anatomy.config, anatomy.family, replace(whole, hidden=width))
        except UserError:
            if chosen:
                raise
            found.add(width)
    return frozenset(found)


def _chosen_shape(anatomy: Anatomy, args: NutePruneConfig) -> Shape | None:
    """Return the dimensions that the user chose, checked; None if it is by a target."""
    if args.shape is None:
        return None
    if not isinstance(args.shape, Mapping):
        raise UserError(f"shape is {args.shape!r}; it must map names to counts")
    whole = anatomy.shape
    floor = whole.cut_to(args.shape)
    few = [i for i, x in enumerate(floor.layers) if 0 < x.experts < anatomy.per_token]
    if few:
        raise UserError(
            f"layer {few[0]} of the shape has {floor.layers[few[0]].experts} experts, and each "
            f"token is routed to {anatomy.per_token}: keep at least {anatomy.per_token}"
        )
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
