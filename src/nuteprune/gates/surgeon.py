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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nuteprune.gates.probe import LOSS_SCALE, Probe, Scores
from nuteprune.model.layerwise import Layerwise

DAMPING = 1e-2
"""What is added to the diagonal of C, as a share of itself."""
LEAST = 1e-30
"""What is added for an input that is always 0: next to nothing, and so is its unit's cost."""
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
        inverses = {
            block: damped_inverse(covariance_II / tokens)
            for block, covariance_II in text.advance(layer, watched).items()
        }
        for kind in kinds:
            found[kind].append(removal_costs(slopes[kind, layer], inverses[INPUTS[kind]]))
        probe.progress()
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def draw_tokens(logits_BTV: Tensor, generator: torch.Generator) -> Tensor:
    """Return tokens (B, T) drawn from the distributions of next tokens."""
    chances_MV = logits_BTV.detach().float().softmax(-1).flatten(0, 1)
    drawn_M = torch.multinomial(chances_MV, 1, generator=generator).flatten()
    return drawn_M.view(logits_BTV.shape[:2])


def damped_inverse(covariance_II: Tensor) -> Tensor:
    """Return (C + damping)^-1 (I, I) in fp64.

    Each input is damped by its own variance: a unit's cost is then the same in whatever units its
    activations are counted, and one massive activation does not damp all others.
    """
    c_II = covariance_II.double()
    diagonal_I = c_II.diagonal()
    diagonal_I.add_(DAMPING * diagonal_I + LEAST)
    return _inverse(c_II)


def removal_costs(slope_UWW: Tensor, inverse_II: Tensor) -> Tensor:
    """Return tr(S_u ([C^-1]_uu)^-1) (U,) in fp32 on the CPU, for S_u (W, W) of each unit."""
    count, width = slope_UWW.shape[:2]
    blocks = inverse_II.view(count, width, count, width)
    own_UWW = torch.stack([blocks[u, :, u] for u in range(count)])
    unexplained_UWW = _inverse(own_UWW)
    return (slope_UWW.to(unexplained_UWW) * unexplained_UWW).sum((1, 2)).float().cpu()


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
            drawn_BT = draw_tokens(logits_BTV, generator)
            loss = cross_entropy(logits_BTV.float().flatten(0, 1), drawn_BT.flatten())
            # A mean over sequences; what is wanted are gradients of their sum.
            (loss * len(batch_BT) * LOSS_SCALE).backward()
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
    family = probe.anatomy.family
    projection = (family.attention if block == "attention" else family.mlp)[-1]
    module: nn.Module | None = probe.anatomy.projection(layer, projection)
    return module
