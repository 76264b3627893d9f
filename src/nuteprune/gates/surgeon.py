"""What removing units costs once the weights that stay make up for them, measured on text.

The maths is that of `gates.surgeon_costs`: a projection's inputs have a curvature C, and the loss's
gradients by them second moments. Neurons of a routed expert have those of its own down projection.

The loss is the cross entropy of tokens that the model itself draws: its curvature is that of the KL
divergence from the dense model, which distillation minimises. Gradients need little text. C needs
more, to tell rare inputs from predictable ones, but no gradients.

The move is the closed-form refit of `shrink.least_squares`; the curvature here is that of the dense
model. Source: LLM Surgeon (van der Ouderaa et al. 2024, arXiv 2312.17244).

Shape suffixes: B batch, T tokens, M = B x T, V vocabulary, I inputs of a projection, U units of a
kind in a layer, E experts, F neurons of each, R rows of moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.gates.scores import LOSS_SCALE, Probe, Scores, check_finite
from nuteprune.gates.surgeon_costs import (
    neuron_costs,
    noting_routed,
    removal_costs,
    watched_experts,
)
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.forwards import in_place_of
from nuteprune.model.layerwise import Layerwise
from nuteprune.model.packed import weight_of
from nuteprune.model.sharding import gathered
from nuteprune.simulated import number

INPUTS = {"heads": "attn_block", "kv_groups": "attn_block", "neurons": "mlp_block"}
"""Kind of gate -> the block whose last projection reads its units, and is refitted."""
READ = {**INPUTS, "expert_neurons": "experts"}
"""The same of all kinds that have this cost."""

Key = tuple[str, int]
"""A block, and a layer."""
AddMoments = Callable[[str, int, Tensor], None]
"""Takes in (block, layer, sums over some tokens (R, I)); see `input_slopes`."""


def has_cost(anatomy: Anatomy, kind: str) -> bool:
    """Return whether this module can score units of a kind.

    Experts that read all tokens, weighed before, do not show their neurons.
    """
    experts = anatomy.family.experts
    hidden = kind == "expert_neurons" and experts is not None and experts.weighed_first
    return kind in READ and not hidden


def surgeon_scores(probe: Probe) -> Scores:
    """Return the cost (N,) of removing each unit: a sum over the tokens of a sequence."""
    return removal_scores(probe, input_slopes(probe))


def removal_scores(probe: Probe, slopes: Mapping[Key, Tensor]) -> Scores:
    """Return the scores from the result of `input_slopes`, without gradients."""
    text = Layerwise(probe.anatomy, probe.hooks, None, probe.plain_batches)
    tokens = sum(batch_BT.numel() for batch_BT in probe.plain_batches)
    found: dict[str, list[Tensor]] = {kind: [] for kind in probe.kinds}
    for layer in range(len(probe.anatomy.layers)):
        blocks = [block for block, i in slopes if i == layer and block != "experts"]
        mixture = probe.anatomy.mixture(layer) if ("experts", layer) in slopes else None
        with noting_routed(mixture) as routed:
            covariances = text.advance(layer, {x: _reader(probe, x, layer) for x in blocks})
        if mixture is not None:
            slopes_EF = slopes["experts", layer][0].view(mixture.sizes)
            with gathered(probe.anatomy.layers[layer]):
                costs_EF = neuron_costs(mixture, routed, slopes_EF)
            found["expert_neurons"].append(costs_EF.flatten())
        for block in blocks:
            covariance_II = covariances.pop(block).div_(tokens)
            check_finite([covariance_II.diagonal()], "surgeon")
            slopes_I, changes_I = slopes[block, layer]
            slopes_I = slopes_I * share_that_counts(slopes_I, changes_I, covariance_II.diagonal())
            lengths_I = slopes_I.sqrt()
            kinds = [kind for kind in probe.kinds if READ[kind] == block]
            counts = [probe.layout.sizes[kind][layer] for kind in kinds]
            linear = probe.anatomy.linear(layer, probe.anatomy.ends(layer)[block])
            assert linear is not None
            costs = removal_costs(weight_of(linear).float(), lengths_I, covariance_II, counts)
            for kind, costs_U in zip(kinds, costs, strict=True):
                found[kind].append(costs_U)
        probe.progress()
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def draw_tokens(chances_BTV: Tensor, generator: torch.Generator) -> Tensor:
    """Return next tokens (B, T), drawn by their probabilities."""
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


def input_slopes(probe: Probe) -> dict[Key, Tensor]:
    """Return moments (R, I) of the loss's gradients by the inputs of last projections.

    Averaged over sequences; the loss is a sequence's mean. The first row are squared gradients,
    summed over tokens. The second are squared changes of the loss without the input in the whole
    sequence, to first order: sums over tokens of its products with its gradients, squared. Neurons
    of routed experts have the first alone.
    """
    device = probe.anatomy.model.device
    generator = torch.Generator(device).manual_seed(probe.seed)
    total: dict[Key, Tensor] = {}
    sequences = sum(len(batch_BT) for batch_BT in probe.batches)

    def add_moments(block: str, layer: int, moments_RI: Tensor) -> None:
        moments_RI, key = moments_RI / LOSS_SCALE**2 / sequences, (block, layer)
        total[key] = total[key] + moments_RI if key in total else moments_RI

    with _gradients_of_inputs(probe, add_moments):
        for batch_BT in probe.batches:
            _back(probe, batch_BT.to(device), generator)
            probe.progress()
    return total


def share_that_counts(slopes_I: Tensor, changes_I: Tensor, squares_I: Tensor) -> float:
    """Return what inputs of a projection cost by the changes of the loss, over what K-FAC says.

    K-FAC takes gradients for independent of inputs, and tokens of one another. But a token of large
    inputs may have small gradients, above all where a norm follows, which divides both. And what
    is missing from many tokens of a sequence adds up, where later layers gather it.

    Args:
        slopes_I: sums of squared gradients.
        changes_I: squared changes of the loss; see `input_slopes`.
        squares_I: means of squared inputs, in whatever unit the inputs' covariance has.

    Returns:
        The median of all inputs: a few of them are switches, which gradients do not show.
    """
    ratio_I = changes_I.double() / (slopes_I.double() * squares_I.double())
    share = number(ratio_I.nan_to_num(math.nan, posinf=math.nan).nanmedian())
    return share if math.isfinite(share) else 1.0  # a projection that is dead


def _back(probe: Probe, ids_BT: Tensor, generator: torch.Generator) -> None:
    # A function of its own: no logits of one batch are left when the next one runs.
    logits_BTV = probe.anatomy.model(input_ids=ids_BT, use_cache=False).logits
    check_finite([logits_BTV], "surgeon")  # no tokens could be drawn from others
    slope_BTV = drawn_slope(logits_BTV.detach(), generator).mul_(LOSS_SCALE)
    logits_BTV.backward(slope_BTV.to(logits_BTV.dtype))


@contextmanager
def _gradients_of_inputs(probe: Probe, add: AddMoments) -> Iterator[None]:
    """Pass on squared gradients by what last projections read, as a backward pass forms them."""
    anatomy = probe.anatomy
    with ExitStack() as stack:
        stack.enter_context(anatomy.embedding.register_forward_hook(_require_gradients))
        for block in dict.fromkeys(READ[kind] for kind in probe.kinds):
            for layer in range(len(anatomy.layers)):
                add_own = partial(add, block, layer)
                if block == "experts":
                    mixture = anatomy.mixture(layer)
                    if mixture is not None:
                        watched = watched_experts(mixture, partial(_add_row, add_own))
                        stack.enter_context(in_place_of([mixture.experts], [watched]))
                elif (module := _reader(probe, block, layer)) is not None:
                    stack.enter_context(module.register_forward_pre_hook(_adding_moments(add_own)))
        yield


def _add_row(add: Callable[[Tensor], None], row_I: Tensor) -> None:
    add(row_I[None])


def _adding_moments(add: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs_BTI = args[0].detach()

        def note(grad_BTI: Tensor) -> None:
            grad_BTI = grad_BTI.float()
            slopes_I = grad_BTI.square().flatten(0, -2).sum(0)
            changes_BI = (grad_BTI * inputs_BTI).sum(-2).view(-1, len(slopes_I))
            add(torch.stack([slopes_I, changes_BI.square().sum(0)]))

        args[0].register_hook(note)

    return hook


def _require_gradients(_: nn.Module, __: Any, output: Tensor) -> None:
    # Weights are frozen, so gradients reach the layers from what they read.
    output.requires_grad_(True)


def _reader(probe: Probe, block: str, layer: int) -> Any:
    return probe.anatomy.projection(layer, probe.anatomy.ends(layer)[block])
