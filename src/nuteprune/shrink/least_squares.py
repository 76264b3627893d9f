"""Closed-form refit of the output and down projections to the inputs that are left.

Once heads and neurons are chosen, each output and down projection is fitted by ridge regression
so that from the kept inputs alone it gives what it gave from all of them, with C = X^T X over the
inputs X: W' = W C[:, kept] (C[kept, kept] + ridge)^-1. Layers are fitted in order, each on the
activations of the already pruned and fitted layers before it. These have left the residual stream
off the dense model's: a fit makes up for half of that too, also in layers that lost nothing.

A routed expert is heard as g x its output, with g the router's weight of a token. So its down
projection is fitted on its own tokens, those that the pruned model routes to it, squared errors
counted g^2 times. It makes up for nothing else.

Source: optimal brain surgeon in its layer-wise form (Hassibi and Stork 1993); the idea of
refitting the layer's output after structured pruning, He, Zhang and Sun 2017 (arXiv 1707.06168).

Shape suffixes: B batch, T tokens, D hidden width, O rows, I columns, E experts, F neurons of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from nuteprune.gates.masks import Masks
from nuteprune.gates.surgeon_costs import Routed, neuron_covariance
from nuteprune.model.anatomy import Anatomy, Mixture, without_lora
from nuteprune.model.covariance import Read
from nuteprune.model.family import BLOCK_KINDS, Projection
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.layerwise import Layerwise
from nuteprune.model.lora import effective_weight
from nuteprune.model.weights import gathered, is_sharded, weight_of
from nuteprune.processes import ALONE, Team
from nuteprune.shrink.ridge import Fit, divided, ridge_fit
from nuteprune.simulated import alike

FEEDBACK = 0.5
"""Share of the residual stream's error that the block which reads it makes up for. All of it fits
noise: see docs/log.md. Blocks that stand side by side (GPT-NeoX, Phi, Cohere) read the same stream,
and are asked for as much each; no such model was measured."""

LEAST_GAIN = 0.1
"""A norm behind a block multiplies each output by its gain, so what the stream lacks is divided by
that. Where a gain is far below this share of their root mean square, nothing is asked for."""

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
            install(i, projection, _fit(anatomy, text, i, block, mask, *lack, dense, team))
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
            if _lost(mask) or (lost and block in norms):
                lost = True
                own.append((block, projection, mask))
    return found


def _inverse_gain(gain_O: Tensor) -> Tensor:
    """Return 1 / gain (O,), and about gain / least^2 where that is small; see `LEAST_GAIN`."""
    least = LEAST_GAIN * gain_O.square().mean().sqrt()
    return gain_O / (gain_O.square() + least.square()).clamp(min=torch.finfo(gain_O.dtype).tiny)


def _lost(mask: Tensor) -> bool:
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
