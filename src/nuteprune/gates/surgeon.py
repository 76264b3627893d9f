"""What removing a unit costs once the weights that stay are re-fitted to make up for it.

The loss is taken as quadratic in a projection's weight W (O, I), with the Kronecker-factored
curvature G x C: C = X^T X / M of its inputs X, G = D^T D / M of the gradients D of its outputs.
Cutting the columns u out of W and moving the others so that the loss rises least costs

    tr(W_u^T G W_u  ([C^-1]_uu)^-1).

The first factor is the second moment of the gradients of X_u. The second is the part of X_u that
the other inputs cannot predict. The loss is the cross entropy of tokens that the model itself
draws: its curvature is that of the KL divergence from the dense model, which distillation
minimises. Gradients need little text. C needs more, to tell rare inputs from predictable ones,
but no gradients.

Source: optimal brain surgeon (Hassibi and Stork 1993) with the curvature of K-FAC (Martens and
Grosse 2015, arXiv 1503.05671), for structures of language models: LLM Surgeon (van der Ouderaa et
al. 2024, arXiv 2312.17244). The move is the closed-form re-fit of `shrink.compensate`; the
curvature here is that of the dense model.

Shape suffixes: B batch, T tokens, M = B x T, I inputs of a projection, U units of a kind in a
layer, W inputs of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.gates.probe import LOSS_SCALE, Probe, Scores
from nuteprune.model.layerwise import Layerwise
from nuteprune.simulated import usual

DAMPING = 1e-2
"""What is added to the diagonal of C, as a share of itself."""
LEAST = 1e-30
"""What is added for an input that is always 0: next to nothing, and so is its unit's cost."""
ROUNDING = 1e-2
"""How far C^-1 C may be from 1, along one direction, before it is computed in fp64."""
INPUTS = {"heads": "attention", "kv_groups": "attention", "neurons": "mlp"}
"""Kind of gate -> the block whose last projection reads its units."""

Key = tuple[str, int]
"""A kind of gate, and a layer."""


def surgeon_scores(probe: Probe) -> Scores:
    """Return the cost (N,) of removing each unit: a sum over the tokens of a sequence."""
    slopes = _input_slopes(probe)
    text = Layerwise(probe.anatomy, probe.hooks, None, probe.plain_batches)
    tokens = sum(batch_BT.numel() for batch_BT in probe.plain_batches)
    found: dict[str, list[Tensor]] = {kind: [] for kind in probe.kinds}
    for layer in range(len(probe.anatomy.layers)):
        kinds = [kind for kind in probe.kinds if (kind, layer) in slopes]
        readers = {INPUTS[kind]: _reader(probe, INPUTS[kind], layer) for kind in kinds}
        watched = {block: module for block, module in readers.items() if module is not None}
        covariances = text.advance(layer, watched)
        for block in watched:
            chosen = [kind for kind in kinds if INPUTS[kind] == block]
            costs = removal_costs(
                [slopes[kind, layer] for kind in chosen], covariances.pop(block).div_(tokens)
            )
            for kind, costs_U in zip(chosen, costs, strict=True):
                found[kind].append(costs_U)
        probe.progress()
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def draw_tokens(chances_BTV: Tensor, generator: torch.Generator) -> Tensor:
    """Return next tokens (B, T) drawn from their chances."""
    drawn_M = torch.multinomial(chances_BTV.flatten(0, 1), 1, generator=generator).flatten()
    return drawn_M.view(chances_BTV.shape[:2])


def drawn_slope(logits_BTV: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient (B, T, V) of the loss by the logits, for tokens that the model draws.

    The loss is the sum over sequences of each one's mean cross entropy.
    """
    slope_BTV = logits_BTV.float().softmax(-1)
    drawn_BT1 = draw_tokens(slope_BTV, generator).unsqueeze(-1)
    slope_BTV.scatter_add_(-1, drawn_BT1, slope_BTV.new_full((1, 1, 1), -1).expand_as(drawn_BT1))
    return slope_BTV.div_(logits_BTV.shape[1])


def removal_costs(slopes: Sequence[Tensor], covariance_II: Tensor) -> list[Tensor]:
    """Return tr(S_u ([C^-1]_uu)^-1) (U,) of one projection's units, in fp32 on the CPU.

    Each input is damped by its own variance: a unit's cost is then the same in whatever units its
    activations are counted, and one massive activation does not damp all others.

    Args:
        slopes: S_u (U, W, W) of each kind's units, W = I / U.
        covariance_II: C in fp32; used up.
    """
    size_I = (covariance_II.diagonal() * (1 + DAMPING) + LEAST).sqrt()
    correlation_II = covariance_II.div_(size_I).div_(size_I[:, None])
    correlation_II.fill_diagonal_(1)
    inverse_II = inverse_of_correlations(correlation_II)
    found = []
    for slope_UWW in slopes:
        count, width = slope_UWW.shape[:2]
        blocks = inverse_II.view(count, width, count, width).diagonal(dim1=0, dim2=2)
        unexplained_UWW = _inverse(blocks.permute(2, 0, 1).double())
        size_UW = size_I.view(count, width)
        scaled_UWW = slope_UWW * size_UW[:, None] * size_UW[:, :, None]
        found.append((scaled_UWW * unexplained_UWW).sum((1, 2)).float().cpu())
    return found


def inverse_of_correlations(correlation_II: Tensor) -> Tensor:
    """Return the inverse (I, I) of correlations: in fp32 if that is as exact as they are.

    Damping bounds their condition, so it nearly always is. Told by a product with random signs.
    """
    generator = torch.Generator(correlation_II.device).manual_seed(0)
    signs_I = torch.empty_like(correlation_II[0]).uniform_(-1, 1, generator=generator).sign()
    factor_II, failed = torch.linalg.cholesky_ex(correlation_II)
    if usual(failed == 0):
        inverse_II = torch.cholesky_inverse(factor_II)
        error_I = (correlation_II @ (inverse_II @ signs_I) - signs_I).abs()
        if usual(error_I.max() < ROUNDING):
            return inverse_II
    return _inverse(correlation_II.double())


def _inverse(positive: Tensor) -> Tensor:
    """Return the inverse of positive definite matrices (..., I, I)."""
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(positive))
    return inverse


def _input_slopes(probe: Probe) -> dict[Key, Tensor]:
    """Return the second moments (U, W, W) of the loss's gradients by the inputs of each unit.

    Summed over tokens, averaged over sequences; the loss is a sequence's mean.
    """
    device = next(probe.anatomy.model.parameters()).device
    generator = torch.Generator(device).manual_seed(probe.seed)
    total: dict[Key, Tensor] = {}
    sequences = sum(len(batch_BT) for batch_BT in probe.batches)

    def take(kind: str, layer: int, grad_MI: Tensor) -> None:
        units = probe.layout.sizes[kind][layer]
        grad_MUW = grad_MI.reshape(len(grad_MI), units, -1) / LOSS_SCALE
        slope_UWW = torch.einsum("muv,muw->uvw", grad_MUW, grad_MUW) / sequences
        key = kind, layer
        total[key] = total[key] + slope_UWW if key in total else slope_UWW

    with _gradients_of_inputs(probe, take):
        for batch_BT in probe.batches:
            logits_BTV = probe.anatomy.model(input_ids=batch_BT.to(device), use_cache=False).logits
            slope_BTV = drawn_slope(logits_BTV.detach(), generator).mul_(LOSS_SCALE)
            logits_BTV.backward(slope_BTV.to(logits_BTV.dtype))
            probe.progress()
    return total


@contextmanager
def _gradients_of_inputs(probe: Probe, take: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Tell the gradients (M, I) by what reads each kind's units, as a backward pass forms them."""
    handles = [probe.anatomy.embedding.register_forward_hook(_require_gradients)]
    for kind in probe.kinds:
        for layer in range(len(probe.anatomy.layers)):
            module = _reader(probe, INPUTS[kind], layer)
            if module is not None:
                handles.append(module.register_forward_pre_hook(_watching(kind, layer, take)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watching(
    kind: str, layer: int, take: Callable[[str, int, Tensor], None]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        args[0].register_hook(lambda grad: take(kind, layer, grad.flatten(0, -2).float()))

    return hook


def _require_gradients(_: nn.Module, __: Any, output: Tensor) -> None:
    # Weights are frozen, so gradients reach the layers from what they read.
    output.requires_grad_(True)


def _reader(probe: Probe, block: str, layer: int) -> nn.Module | None:
    anatomy = probe.anatomy
    attention = block == "attention"
    projection = anatomy.family.attention[-1] if attention else anatomy.down(layer)
    module: nn.Module | None = anatomy.projection(layer, projection)
    return module
