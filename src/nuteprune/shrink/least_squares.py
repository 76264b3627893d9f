"""Closed-form refit of the output and down projections to the inputs that are left.

Once heads and neurons are chosen, each output and down projection is fitted by ridge regression
so that from the kept inputs alone it gives what it gave from all of them, with C = X^T X over the
inputs X: W' = W C[:, kept] (C[kept, kept] + ridge)^-1. Layers are fitted in order, each on the
activations of the already pruned and fitted layers before it. These have left the residual stream
off the dense model's: a fit makes up for half of that too, also in layers that lost nothing.

Source: optimal brain surgeon in its layer-wise form (Hassibi and Stork 1993); the idea of
refitting the layer's output after structured pruning, He, Zhang and Sun 2017 (arXiv 1707.06168).

Shape suffixes: B batch, T tokens, D hidden width, O rows, I columns, K kept columns, R rows
that are fitted together, E experts, F neurons of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy, Mixture, without_lora
from nuteprune.model.covariance import Read
from nuteprune.model.family import BLOCK_KINDS, Projection
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.layerwise import Layerwise
from nuteprune.model.lora import effective_weight
from nuteprune.model.weights import gathered, is_sharded, weight_of
from nuteprune.processes import ALONE, Team
from nuteprune.simulated import alike, usual

FEEDBACK = 0.5
"""Share of the residual stream's error that the block which reads it makes up for. All of it fits
noise: see docs/log.md. Blocks that stand side by side (GPT-NeoX, Phi, Cohere) read the same stream,
and are asked for as much each; no such model was measured."""

LEAST_GAIN = 0.1
"""A norm behind a block multiplies each output by its gain, so what the stream lacks is divided by
that. Where a gain is far below this share of their root mean square, nothing is asked for."""

RIDGE = 1e-1
"""Ridge: what is added to the diagonal of C, as a share of itself; more with few tokens."""
TOKENS_EACH = 18
"""With fewer tokens for each input the ridge grows by as much, up to 1: else a fit to little text
fits what is particular to it; see docs/log.md."""
LEAST = 1e-30
"""Ridge of an input that is always 0: the weights that read it stay as they are. Also what the
square of a gain counts as at least."""
LEAST_ROWS, MOST_PARTS = 48, 64
"""Of a weight: rows that are fitted together at least, and parts that it is fitted in at most."""


@dataclass(frozen=True)
class Fit:
    """A refitted weight.

    Args:
        weight_OI: the new weight, zero columns where inputs are gone, fp32.
        covariance_II: X^T X of the masked inputs that it was fitted on, fp32.
    """

    weight_OI: Tensor
    covariance_II: Tensor


Install = Callable[[int, Projection, Fit], None]
"""Puts the fit of (layer, projection) into the model, before the next one is made."""

InstallStack = Callable[[int, Projection, Tensor], None]
"""The same of a stack of routed experts."""


@torch.no_grad()
def fit_projections(
    anatomy: Anatomy,
    hooks: MaskHooks,
    masks: Masks,
    batches: Sequence[Tensor],
    install: Install,
    progress: Callable[[], None] = lambda: None,
    dense: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    install_stack: InstallStack | None = None,
    team: Team = ALONE,
) -> None:
    """Fit the output and down projections of all layers, in order.

    Args:
        anatomy: the model, LoRA attached or merged; its weights have all their columns still.
        hooks: where masks multiply in it.
        masks: the final masks; layers are fitted from the first one on that lost inputs.
        batches: token ids (B, T) of calibration text, T the same in all.
        install: puts each fit into the model at once.
        progress: called after each layer.
        dense: a context in which a layer has the dense model's weights.
        install_stack: puts routed experts' fits into the model; None: these stay as they are.
        team: the processes that share the batches and the rows of the weights out.
    """
    layers = range(len(anatomy.layers))
    ends = _fitted_ends(anatomy, masks)
    thin = [None] * len(layers) if install_stack is None else _lost_neurons(anatomy, masks)
    if not any(ends) and all(x is None for x in thin):  # as where whole experts go alone
        for _ in ends:
            progress()
        return
    text = Layerwise(anatomy, hooks, masks, batches, team)
    # Fits of experts alone ask nothing of the dense model's stream.
    intact = Layerwise(anatomy, hooks, None, batches, team) if any(ends) else None
    for i, found in enumerate(ends):
        norms = _norms_before(anatomy, i)
        read: dict[str, Read] = {}
        if intact is not None:
            with dense(i):
                read = intact.reads(i, norms)
        for block, projection, mask in found:
            lack = norms.get(block), read.pop(block, ())
            install(i, projection, _fit(anatomy, text, i, block, mask, *lack, dense, team))
        read.clear()  # large, as what the next layer's norms read
        if install_stack is not None and (mask_EF := thin[i]) is not None:
            from nuteprune.shrink.expert_fits import fitted_stack  # mixtures alone need it

            mixture = cast(Mixture, anatomy.mixture(i))
            with gathered(anatomy.layers[i]):
                with dense(i):
                    target = mixture.stack(mixture.down)
                routed = text.calls(i, mixture.experts)
                fitted = fitted_stack(mixture, routed, mask_EF, target, team)
            install_stack(i, mixture.down, fitted)
            del target, routed, fitted  # large
        text.advance(i)
        progress()


def _fit(
    anatomy: Anatomy,
    text: Layerwise,
    layer: int,
    block: str,
    mask_I: Tensor,
    norm: nn.Module | None,
    read: Read,
    dense: Callable[[int], AbstractContextManager[Any]],
    team: Team,
) -> Fit:
    """Return the last projection of a block, fitted where the text stands.

    Args:
        anatomy: the model.
        text: calibration text in front of the layer.
        layer: its index.
        block: a block of it.
        mask_I: multipliers of the projection's inputs.
        norm: through which the block reads the residual stream; None: no correction.
        read: the norm's inputs in the dense model, by batch.
        dense: see `fit_projections`.
        team: see `fit_projections`.
    """
    projection = anatomy.ends(layer)[block]
    module = anatomy.projection(layer, projection)
    covariance_II, more_OI = text.covariance(layer, projection, norm, read)
    weight_OI = effective_weight(module)
    with dense(layer):  # LoRA may have made up for some of what is gone
        # A copy where the context lets go of what it gathered.
        copies = is_sharded(anatomy.layers[layer])
        target_OI = weight_of(without_lora(module)).to(torch.float32, copy=copies)
    if more_OI is not None:
        more_OI.mul_(FEEDBACK / anatomy.block_scale(block))
        if (behind := anatomy.post_norm(layer, block)) is not None:
            gain_O = weight_of(cast(nn.Linear, behind)).float() + anatomy.norm_offset
            more_OI.mul_(_inverse_gain(gain_O).unsqueeze(-1))
    mask_I = mask_I.to(weight_OI)

    def fitted(rows: slice) -> Tensor:
        more = None if more_OI is None else more_OI[rows]
        own = weight_OI[rows], covariance_II, mask_I, target_OI[rows]
        return ridge_fit(*own, more, text.tokens, together)

    together = divided(len(weight_OI))
    fitted_OI = team.by_rows(len(weight_OI), fitted, together)
    return Fit(fitted_OI, covariance_II.mul_(mask_I).mul_(mask_I[:, None]))


def _fitted_ends(anatomy: Anatomy, masks: Masks) -> list[list[tuple[str, Projection, Tensor]]]:
    """Return (block, projection, mask) of what is fitted in each layer.

    These are the last projections that lost inputs, and those after them that have masks and can
    make up for what the stream lacks by then.
    """
    found: list[list[tuple[str, Projection, Tensor]]] = [[] for _ in anatomy.layers]
    lost = False
    for i, own in enumerate(found):
        masked, norms = masks.inputs(i), _norms_before(anatomy, i)
        for block, projection in anatomy.ends(i).items():
            mask = masked[block]
            if mask is None or anatomy.projection(i, projection) is None:
                continue
            if has_lost(mask) or (lost and block in norms):
                lost = True
                own.append((block, projection, mask))
    return found


def _inverse_gain(gain_O: Tensor) -> Tensor:
    """Return 1 / gain (O,), and about gain / least^2 where that is small; see `LEAST_GAIN`."""
    least = LEAST_GAIN * gain_O.square().mean().sqrt()
    return gain_O / (gain_O.square() + least.square()).clamp(min=LEAST)


def _lost_neurons(anatomy: Anatomy, masks: Masks) -> list[Tensor | None]:
    """Return multipliers (E, F) of each layer's experts, where they lost neurons."""
    if "expert_neurons" not in masks.values:
        return [None] * len(anatomy.layers)
    from nuteprune.shrink.expert_fits import lost_neurons

    return [lost_neurons(anatomy, masks, i) for i in range(len(anatomy.layers))]


def has_lost(mask: Tensor) -> bool:
    """Return whether a mask has zeros."""
    return not bool((mask > 0).all())


def _norms_before(anatomy: Anatomy, layer: int) -> dict[str, nn.Module]:
    """Return block -> norm of what it reads, where what it writes is added to that."""
    found, mixture = {}, anatomy.mixture(layer)
    for block in BLOCK_KINDS:
        norm = anatomy.pre_norm(layer, block)
        weighed = mixture is not None and block == "mlp_block" and mixture.entry.shared_gate
        if norm is not None and not weighed:
            found[block] = norm
    return found


def ridge_fit(
    weight_OI: Tensor,
    covariance_II: Tensor,
    mask_I: Tensor,
    target_OI: Tensor,
    more_OI: Tensor | None = None,
    tokens: int | None = None,
    together: int | None = None,
) -> Tensor:
    """Return the weight (O, I) that from the kept columns of X alone best gives X target^T + E.

    Soft masks are taken into account: the input is X * mask, and so is the fit.

    Args:
        weight_OI: the weight that the ridge pulls towards, fp32.
        covariance_II: X^T X of the unmasked inputs, fp32.
        mask_I: multipliers of the inputs, 0 where they are gone.
        target_OI: the weight whose outputs from all inputs the fit aims at, fp32.
        more_OI: E^T X, with E what it aims at beyond these outputs, fp32; None: nothing.
        tokens: rows of X; None: enough.
        together: how many rows of the weight are fitted together; None: all.
    """
    kept_I = mask_I > 0
    kept_K = kept_I.nonzero().flatten()
    solve = _solver(covariance_II, kept_K, ridge_of(len(covariance_II), tokens))
    fitted_OI = torch.zeros_like(weight_OI)

    def fit(rows: slice) -> None:
        missing_RI = (weight_OI[rows] * kept_I).neg_().add_(target_OI[rows]) @ covariance_II
        if more_OI is not None:
            missing_RI += more_OI[rows]
        update_KR = solve(missing_RI[:, kept_K].T)
        fitted_RK = (weight_OI[rows][:, kept_K] + update_KR.T) / mask_I[kept_K].float()
        fitted_OI[rows, kept_K] = fitted_RK

    size = together or len(weight_OI)
    for start in alike(range(0, len(weight_OI), size), weight_OI):
        fit(slice(start, start + size))
    return fitted_OI


def divided(rows: int) -> int:
    """Return how many rows of a weight are fitted together; it divides them.

    As many for any number of processes: rounding may depend on it.
    """
    least = max(LEAST_ROWS, -(-rows // MOST_PARTS))
    return next(size for size in range(min(least, rows), rows + 1) if rows % size == 0)


def ridge_of(inputs: int, tokens: int | None) -> float:
    """Return the ridge of a fit to so many tokens; None: enough."""
    return RIDGE if tokens is None else min(1.0, RIDGE * max(1.0, TOKENS_EACH * inputs / tokens))


def with_ridge(covariance_II: Tensor, kept_K: Tensor, ridge: float) -> Tensor:
    """Return C of the kept inputs (K, K), each input's own share added to its diagonal.

    So the fit does not depend on the scale of an input, and one massive activation
    does not pull the weights of all others back to where they were.
    """
    inner_KK = covariance_II[kept_K[:, None], kept_K]
    inner_KK.diagonal().mul_(1 + ridge).add_(LEAST)
    return inner_KK


def _solver(covariance_II: Tensor, kept_K: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    # What is factored is not held: it is large, and hardly ever wanted again.
    factor_KK, failed = torch.linalg.cholesky_ex(with_ridge(covariance_II, kept_K, ridge))
    if usual(failed == 0):
        return lambda wanted_KR: torch.cholesky_solve(wanted_KR, factor_KK)
    # Rounding, or values that are not finite.
    return partial(torch.linalg.solve, with_ridge(covariance_II, kept_K, ridge))
