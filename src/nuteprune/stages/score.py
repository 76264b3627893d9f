"""Score: what each unit costs, by a method of `gates.importance`.

Scores of one model say little of what is left once much of it is gone. So beyond `MOST_AT_ONCE`
there are rounds: what goes by the scores so far is cut, the others are refitted, and what is left
is scored again.

Shape suffixes: N blocks, T tokens of a block.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from nuteprune.console import Progress, counted, silent
from nuteprune.gates import METHOD
from nuteprune.gates.importance import METHODS
from nuteprune.gates.scores import Probe, Scores, check_finite
from nuteprune.model.layerwise import BATCH
from nuteprune.stages import Prunable
from nuteprune.stages.choose import choose
from nuteprune.stages.refit import refit

SEQUENCES = 32
"""Blocks that gradients are taken on at least, where there are as many. With 8 the choice of units
is much worse; see docs/log.md."""
MOST_AT_ONCE = 0.3
"""Largest share of the projections that one scoring may remove; see docs/log.md."""


def score(
    model: Prunable,
    blocks: Tensor,
    *,
    method: str = METHOD,
    target: float = 0.0,
    refit_blocks: Tensor | None = None,
    gradients: int | None = None,
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
        seed: draws random scores, tokens from the model, and tokens that repeat.
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
        weights = refit(model, masks, refit_blocks, progress=progress)
        with model.bank.kept():
            model.bank.install(weights)
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
    plain = blocks.split(BATCH) if chosen.by_layer else ()
    cut = sum(kind in kinds for kind in ("heads", "kv_groups")) * chosen.cuts
    turns = len(batches) + len(anatomy.layers) * (bool(plain) + cut)
    tick = counted(progress, "score", turns)
    budget = model.allocator.budget

    def cut_by(scores: Scores) -> Scores:
        return choose(model, scores, target).to("cpu").values

    aim = cut_by if target else None
    team = model.team_over(len(batches))
    probe = Probe(anatomy, model.hooks, budget, kinds, batches, plain, seed, tick, aim, team)
    trained = [p for p in anatomy.model.parameters() if p.requires_grad]
    anatomy.model.requires_grad_(False)  # gradients of activations alone are taken
    try:
        with model.bank.silent_left_out():
            scores = chosen.score(probe)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    check_finite(scores.values(), method)
    return {kind: value.float().cpu() for kind, value in scores.items()}
