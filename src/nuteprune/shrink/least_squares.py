"""Closed-form refit of the output and down projections to the inputs that are left.

Once heads and neurons are chosen, each output and down projection is fitted by ridge regression
so that from the kept inputs alone it gives what it gave from all of them (`shrink.ridge`). Layers
are fitted in order, each on the activations of the already pruned and fitted layers before it.
These have left the residual stream off the dense model's: a fit makes up for half of that too.

A routed expert is heard as g x its output, with g the router's weight of a token. So its down
projection is fitted on its own tokens, those that the pruned model routes to it, squared errors
counted g^2 times. It makes up for nothing else.

Source: optimal brain surgeon in its layer-wise form (Hassibi and Stork 1993); the idea of
refitting the layer's output after structured pruning, He, Zhang and Sun 2017 (arXiv 1707.06168).

Shape suffixes: B batch, T tokens, D hidden width, O rows, I columns, K kept columns, R rank, E
experts, F neurons of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from nuteprune.gates.masks import Masks
from nuteprune.gates.surgeon_costs import Routed, neuron_covariance
from nuteprune.model.anatomy import Anatomy, Mixture, without_lora
from nuteprune.model.family import BLOCK_KINDS, Projection
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.layerwise import Layerwise, Read
from nuteprune.model.lora import effective_weight
from nuteprune.model.weights import gathered, is_sharded, weight_of
from nuteprune.processes import ALONE, Team
from nuteprune.shrink.ridge import RIDGE, ridge_fit, with_ridge
from nuteprune.simulated import alike

FEEDBACK = 0.5
"""Share of the residual stream's error that the block which reads it makes up for. All of it fits
noise: see docs/log.md. Blocks that stand side by side (GPT-NeoX, Phi, Cohere) read the same stream,
and are asked for as much each; no such model was measured."""

NOTHING = 1e-4
"""A direction of the update smaller than this share of the largest is rounding."""


@dataclass(frozen=True)
class Fit:
    """A refitted weight.

    Args:
        weight_OI: the new weight, zero columns where inputs are gone, fp32.
        covariance_II: X^T X of the masked inputs that it was fitted on, fp32.
    """

    weight_OI: Tensor
    covariance_II: Tensor


@dataclass(frozen=True)
class Regression:
    """The least-squares problem of a projection.

    Args:
        weight_OI: the weight that the ridge pulls towards, fp32.
        covariance_II: X^T X of its unmasked inputs, fp32.
        target_OI: the weight whose outputs from all inputs the fit aims at, fp32.
        missing_OI: E^T X, with E what it aims at beyond these outputs, fp32; None: nothing.
        tokens: rows of X.
        team: the processes that share the rows out.
    """

    weight_OI: Tensor
    covariance_II: Tensor
    target_OI: Tensor
    missing_OI: Tensor | None
    tokens: int
    team: Team = ALONE

    def fit(self, mask_I: Tensor) -> Tensor:
        """Return the weight fitted to the inputs that a mask leaves."""
        mask_I = mask_I.to(self.weight_OI)

        def fitted(rows: slice) -> Tensor:
            missing_OI = None if self.missing_OI is None else self.missing_OI[rows]
            own = self.weight_OI[rows], self.covariance_II, mask_I, self.target_OI[rows]
            return ridge_fit(*own, missing_OI, self.tokens)

        return self.team.by_rows(len(self.weight_OI), fitted)


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
        masks: the final masks; only layers that lost inputs are fitted.
        batches: token ids (B, T) of calibration text, T the same in all.
        install: puts each fit into the model at once.
        progress: called after each layer.
        dense: a context in which a layer has the dense model's weights.
        install_stack: puts routed experts' fits into the model; None: these stay as they are.
        team: the processes that share the batches and the rows of the weights out.
    """
    layers = range(len(anatomy.layers))
    ends = [_lost_inputs(anatomy, masks, i) for i in layers]
    thin = [None if install_stack is None else _lost_neurons(anatomy, masks, i) for i in layers]
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
            regression = _regression(anatomy, text, i, block, *lack, dense, team)
            fitted_OI = regression.fit(mask)
            masked_II = regression.covariance_II.mul_(mask_I := mask.to(fitted_OI))
            install(i, projection, Fit(fitted_OI, masked_II.mul_(mask_I[:, None])))
            del regression, fitted_OI  # large
        read.clear()  # large, as what the next layer's norms read
        if install_stack is not None and (mask_EF := thin[i]) is not None:
            mixture = cast(Mixture, anatomy.mixture(i))
            with gathered(anatomy.layers[i]):
                with dense(i):
                    target = mixture.stack(mixture.down)
                routed = text.calls(i, mixture.experts)
                fitted = _fitted_stack(mixture, routed, mask_EF, target, team)
            install_stack(i, mixture.down, fitted)
            del target, routed, fitted  # large
        text.advance(i)
        progress()


def _regression(
    anatomy: Anatomy,
    text: Layerwise,
    layer: int,
    block: str,
    norm: nn.Module | None,
    read: Read,
    dense: Callable[[int], AbstractContextManager[Any]],
    team: Team,
) -> Regression:
    """Return what the last projection of a block is fitted to where the text stands.

    Args:
        anatomy: the model.
        text: calibration text in front of the layer.
        layer: its index.
        block: a block of it.
        norm: through which the block reads the residual stream; None: no correction.
        read: the norm's inputs in the dense model, by batch.
        dense: see `fit_projections`.
        team: see `fit_projections`.
    """
    projection = anatomy.ends(layer)[block]
    module = anatomy.projection(layer, projection)
    covariance_II, missing_OI = text.covariance(layer, projection, norm, read)
    weight_OI = effective_weight(module)
    with dense(layer):  # LoRA may have made up for some of what is gone
        # A copy where the context lets go of what it gathered.
        copies = is_sharded(anatomy.layers[layer])
        target_OI = weight_of(without_lora(module)).to(torch.float32, copy=copies)
    if missing_OI is not None:
        missing_OI.mul_(FEEDBACK / anatomy.block_scale(block))
    return Regression(weight_OI, covariance_II, target_OI, missing_OI, text.tokens, team)


def _lost_inputs(
    anatomy: Anatomy, masks: Masks, layer: int
) -> list[tuple[str, Projection, Tensor]]:
    """Return (block, projection, mask) of a layer's output projections that lost inputs."""
    masked = masks.inputs(layer)
    return [
        (block, projection, mask)
        for block, projection in anatomy.ends(layer).items()
        if (mask := masked[block]) is not None
        and _lost(mask)
        and anatomy.projection(layer, projection) is not None
    ]


def _lost(mask: Tensor) -> bool:
    return not bool((mask > 0).all())


def _norms_before(anatomy: Anatomy, layer: int) -> dict[str, nn.Module]:
    """Return block -> norm of what it reads, where what it writes is added to that, or scaled."""
    found, mixture = {}, anatomy.mixture(layer)
    for block in BLOCK_KINDS:
        norm = anatomy.pre_norm(layer, block)
        weighed = mixture is not None and block == "mlp_block" and mixture.entry.shared_gate
        if norm is not None and anatomy.post_norm(layer, block) is None and not weighed:
            found[block] = norm
    return found


def low_rank(fit: Fit, base_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors B (O, R) and A (R, I) of the update from `base_OI` to the fit.

    They fit outputs on the calibration inputs, not weights: the singular values are
    those of (W' - W) C^1/2. R is `rank`, or less where fewer directions count.
    """
    kept_K = (fit.covariance_II.diagonal() > 0).nonzero().flatten()
    inner_KK = with_ridge(fit.covariance_II, kept_K, RIDGE).double()
    update_OK = (fit.weight_OI - base_OI.float())[:, kept_K].double()
    # Left singular vectors and values of U C^1/2, from U C U^T: many times cheaper than an SVD.
    squares_O, vectors_OO = torch.linalg.eigh(update_OK @ inner_KK @ update_OK.T)
    sizes_O = squares_O.clamp(min=0).sqrt().flip(0)
    left = vectors_OO.flip(1)[:, :rank][:, sizes_O[:rank] > NOTHING * sizes_O[0]]
    # B A = U U^T (W' - W): the projection onto the leading outputs.
    right = left.T @ update_OK
    size = right.norm(dim=1).clamp(min=1e-12).sqrt()
    inputs_RI = torch.zeros(len(size), base_OI.shape[1]).to(fit.weight_OI)
    inputs_RI[:, kept_K] = (right / size[:, None]).to(inputs_RI)
    return (left * size).to(fit.weight_OI), inputs_RI


def _lost_neurons(anatomy: Anatomy, masks: Masks, layer: int) -> Tensor | None:
    """Return multipliers (E, F) of a layer's experts, of which some are 0; else None.

    Multipliers of removed experts are 1. Also None where experts do not show their neurons.
    """
    mixture, neurons = anatomy.mixture(layer), masks.part("expert_neurons", layer)
    if mixture is None or neurons is None or mixture.entry.weighed_first:
        return None
    neurons_EF = neurons.view(mixture.sizes)
    if (experts_E := masks.part("experts", layer)) is not None:
        neurons_EF = neurons_EF.masked_fill((experts_E <= 0).unsqueeze(-1), 1.0)
    return neurons_EF if _lost(neurons_EF) else None


@torch.no_grad()
def _fitted_stack(
    mixture: Mixture, routed: Routed, mask_EF: Tensor, target: Tensor, team: Team
) -> Tensor:
    """Return the stack of down projections, in the entry's layout, fitted where neurons are gone.

    Columns of neurons that are gone stay as they were, for neurons that may return.

    Args:
        mixture: the experts, their neurons whole.
        routed: the experts' inputs in the pruned model, on this process's calibration text.
        mask_EF: multipliers of neurons, 0 where they are gone.
        target: the stack whose outputs from all neurons the fit aims at.
        team: the processes that share the text out.
    """
    stack = mixture.stack(mixture.down).detach()
    fitted = stack.clone()
    thin = [i for i, mask_F in enumerate(mask_EF) if _lost(mask_F)]
    for expert in alike(thin, stack):
        mask_F, kept_F = mask_EF[expert], mask_EF[expert] > 0
        own_DF, wanted_DF = (mixture.plain(x[expert]).float() for x in (stack, target))
        covariance_FF = neuron_covariance(mixture, routed, expert, team)
        new_DF = ridge_fit(own_DF, covariance_FF, mask_F.to(own_DF), wanted_DF)
        mixture.plain(fitted[expert]).copy_(torch.where(kept_F, new_DF, own_DF))
    return fitted
