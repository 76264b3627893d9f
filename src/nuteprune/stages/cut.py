"""The stages before the first step: score, choose, refit.

Score: what each unit costs, by a method of `gates.importance`. Scores of one model say little of
what is left once much of it is gone. So beyond `MOST_AT_ONCE` there are rounds: what goes by the
scores so far is cut, the others are refitted, and what is left is scored again.

Choose: which units go, from their scores, at exactly the target; see `gates.allocate`.

Refit: the weights that stay, by least squares; see `shrink.least_squares`.

Shape suffixes: N blocks, T tokens of a block, O rows, I columns of a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nuteprune.console import Progress, counted, silent
from nuteprune.gates import METHOD
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.costs import Goal
from nuteprune.gates.importance import METHODS
from nuteprune.gates.masks import Layout, Masks
from nuteprune.gates.scores import Probe, Scores, check_finite
from nuteprune.gates.surgeon import INPUTS
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Projection
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank, Weights
from nuteprune.model.packed import is_packed, weight_of
from nuteprune.processes import ALONE, Team, everyone
from nuteprune.shrink.least_squares import Fit, InstallStack, fit_projections, low_rank
from nuteprune.simulated import has_data

PLAIN_BATCH = 4
"""Blocks that go through a layer together: no gradients, no logits, so more than one fits."""
SEQUENCES = 32
"""Blocks that gradients are taken on at least, where there are as many. With 8 the choice of units
is much worse; see docs/log.md."""
MOST_AT_ONCE = 0.3
"""Largest share of the projections that one scoring may remove; see docs/log.md."""
FEWER_DIRECTIONS = 32
"""Rank of a refit where weights are packed, so that LoRA alone can hold it."""


@dataclass(frozen=True)
class Prunable:
    """A dense model that can be cut, with its hooks.

    Args:
        anatomy: its parts; LoRA is on its projections, and adds nothing.
        hooks: where masks multiply in it.
        bank: LoRA beside its weights, and weights in place of them.
        allocator: which shapes it can be cut to.
        is_sharded: whether its weights are shared out over processes.
    """

    anatomy: Anatomy
    hooks: MaskHooks
    bank: LoraBank
    allocator: Allocator
    is_sharded: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of gates in use."""
        return self.allocator.constraints.kinds

    @property
    def layout(self) -> Layout:
        """Its units."""
        return self.allocator.layout

    @property
    def device(self) -> torch.device:
        """Where its embedding is."""
        device: torch.device = self.anatomy.embedding.weight.device
        return device

    @property
    def team(self) -> Team:
        """The processes that share the work of its stages: those that hold all of it."""
        alone = self.is_sharded or not has_data(self.anatomy.embedding.weight)
        return ALONE if alone else everyone()

    @property
    def is_packed(self) -> bool:
        """Whether its weights are in 8 or 4 bits, so that none can stand in their place."""
        return is_packed(self.anatomy.model)

    @property
    def has_whole_weights(self) -> bool:
        """Whether this process holds its weights as they are: neither packed nor sharded."""
        return not (self.is_sharded or self.is_packed)

    @property
    def can_try_cuts(self) -> bool:
        """Whether cuts can be tried: whole weights are refitted to all that the gates remove."""
        return not self.is_packed and set(self.kinds) <= set(INPUTS)


def score(
    model: Prunable,
    blocks: Tensor,
    *,
    method: str = METHOD,
    target: float = 0.0,
    refit_blocks: Tensor | None = None,
    gradients: int | None = None,
    batch_size: int = 4,
    seed: int = 42,
    progress: Progress = silent,
) -> Scores:
    """Return the loss that removing each unit is expected to cost.

    Units that a round removed keep the scores that removed them.

    Args:
        model: the model.
        blocks: token ids (N, T) of calibration text.
        method: a key of `gates.importance.METHODS`.
        target: the largest sparsity that is to be reached; 0: it is not known.
        refit_blocks: token ids (N, T) for the refit of each round; None: there are no rounds.
        gradients: on how many of the blocks, the first ones, gradients are taken; None:
            `with_gradients`.
        batch_size: blocks that go through a layer together in the refit.
        seed: draws the random scores, and tokens that repeat.
        progress: told of scoring and refit.

    Returns:
        Kind -> (N,), fp32 on the CPU.

    Raises:
        RunFailed: if scores are not finite.
    """
    goals = [target] if refit_blocks is None else [*stops_before(target), target]
    count = with_gradients(method, len(blocks)) if gradients is None else gradients
    found = _score_once(model, blocks, count, method, seed, goals[0], progress)
    for sparsity, after in pairwise(goals):
        assert refit_blocks is not None
        masks = choose(model, found, sparsity)
        weights = refit(model, masks, refit_blocks, batch_size=batch_size, progress=progress)
        with model.bank.using_weights(weights):
            again = _score_once(model, blocks, count, method, seed, after, progress)
        kept = masks.to("cpu").values
        found = {k: torch.where(kept[k] > 0, again[k], found[k]) for k in found}
    return found


def stops_before(target: float) -> list[float]:
    """Return the sparsities on the way to a target at which the other units are scored again."""
    rounds = math.ceil(target / MOST_AT_ONCE - 1e-9)
    return [target * i / rounds for i in range(1, rounds)]


def with_gradients(method: str, blocks: int) -> int:
    """Return on how many of the blocks that a method reads it takes gradients."""
    reads = METHODS[method].reads
    return min(blocks, max(SEQUENCES, blocks // reads)) if reads else 0


def _score_once(
    model: Prunable,
    blocks: Tensor,
    gradients: int,
    method: str,
    seed: int,
    target: float,
    progress: Progress,
) -> Scores:
    chosen, kinds, anatomy = METHODS[method], model.kinds, model.anatomy
    # One block at a time where a scoring may need all logits of a batch.
    batches = blocks[:gradients].split(1) if gradients else ()
    plain = blocks.split(PLAIN_BATCH) if chosen.by_layer else ()
    cut = sum(kind in kinds for kind in ("heads", "kv_groups")) * chosen.cuts
    turns = len(batches) + len(anatomy.layers) * (bool(plain) + cut)
    tick = counted(progress, "score", turns)
    budget = model.allocator.budget

    def cut_by(scores: Scores) -> Scores:
        return choose(model, scores, target).to("cpu").values

    aim = cut_by if target else None
    probe = Probe(anatomy, model.hooks, budget, kinds, batches, plain, seed, tick, aim, model.team)
    trained = [p for p in anatomy.model.parameters() if p.requires_grad]
    anatomy.model.requires_grad_(False)  # gradients of activations alone are taken
    try:
        scores = chosen.score(probe)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    check_finite(scores.values(), method)
    return {kind: value.float().cpu() for kind, value in scores.items()}


def choose(model: Prunable, scores: Scores, target: float | Goal) -> Masks:
    """Return the masks of least loss at a target, 0 and 1, on the model's device.

    Args:
        model: the model.
        scores: kind -> (N,), the loss that removing each unit is expected to cost.
        target: share of the decoder's projection parameters to remove, or another goal.

    Raises:
        UserError: if the gates cannot remove that much.
    """
    shape = model.allocator.shape(scores, target)
    return model.allocator.masks(shape, scores).to(model.device)


@torch.no_grad()
def refit(
    model: Prunable,
    masks: Masks,
    blocks: Tensor,
    *,
    batch_size: int = 4,
    rank: int = FEWER_DIRECTIONS,
    progress: Progress = silent,
) -> Weights:
    """Fit the output and down projections of all layers to the inputs that masks leave.

    Args:
        model: the model.
        masks: the final masks.
        blocks: token ids (N, T) of calibration text.
        batch_size: blocks that go through a layer together.
        rank: of LoRA, which holds the fit where weights are packed.
        progress: told of each layer.

    Returns:
        By name, as `LoraBank` has them: whole weights (O, I) whose columns are 0 where inputs are
        gone, mapped from files on CPUs, and where weights are sharded, with data in the main
        process alone; or LoRA's two sides where weights are packed.
    """
    bank, anatomy = model.bank, model.anatomy
    whole = not model.is_packed

    def install(layer: int, projection: Projection, fit: Fit) -> None:
        if whole:
            bank.set_weight(layer, projection, fit.weight_OI)
            return
        base = anatomy.linear(layer, projection)
        assert base is not None
        bank.set_delta(layer, projection, *low_rank(fit, weight_of(base), rank))

    stacks: InstallStack | None = bank.set_weight if whole else None
    tick = counted(progress, "refit", len(anatomy.layers))
    with bank.kept():
        fit_projections(
            anatomy,
            model.hooks,
            masks,
            blocks.split(batch_size),
            install,
            tick,
            bank.as_dense,
            stacks,
            model.team,
        )
        return bank.weights() if whole else {k: v.clone() for k, v in bank.state().items()}
