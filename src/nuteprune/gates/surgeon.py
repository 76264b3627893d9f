"""What removing units costs once the weights that stay make up for them, measured on text.

The maths is that of `gates.surgeon_costs`: a projection's inputs have a curvature C, and the loss
changes without each of them. Neurons of a routed expert have those of its own down projection.

The loss is the cross entropy of tokens that the model itself draws: its curvature is that of the KL
divergence from the dense model, which distillation minimises. Curvature says that nothing is lost
where the model is all but certain of a token, but a cut changes more than a little, and such tokens
are those that the context gives. So the likeliest tokens alone are drawn, from a flatter
distribution; see `drawn_slope`. Gradients need little text. C needs more, to tell rare inputs from
predictable ones, but no gradients.

The move is the closed-form refit of `shrink.least_squares`; the curvature here is that of the dense
model. Source: LLM Surgeon (van der Ouderaa et al. 2024, arXiv 2312.17244).

Shape suffixes: B batch, T tokens, M = B x T, V vocabulary, K likeliest tokens, S slots,
I inputs of a projection, U units of a kind in a layer, E experts, F neurons of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from nuteprune.gates.scores import LOSS_SCALE, Probe, Scores, check_finite
from nuteprune.gates.surgeon_costs import (
    Changes,
    lengths,
    neuron_costs,
    removal_costs,
    watched_experts,
)
from nuteprune.model.anatomy import Anatomy, Mixture
from nuteprune.model.forwards import in_place_of, noting_calls
from nuteprune.model.layerwise import Layerwise
from nuteprune.model.weights import gathered, weight_of
from nuteprune.processes import sum_dtype

INPUTS = {"heads": "attn_block", "kv_groups": "attn_block", "neurons": "mlp_block"}
"""Kind of gate -> the block whose last projection reads its units, and is refitted."""
READ = {**INPUTS, "expert_neurons": "experts"}
"""The same of all kinds that have this cost."""

LIKELIEST = 16
"""Tokens that may be drawn at a position: of all, unlikely ones would decide at `TEMPERATURE`."""
TEMPERATURE = 2.0
"""Temperature at which they are drawn; measured in docs/log.md."""
SOFTER = 1.5
"""Power of a token's changes that counts; measured in docs/log.md."""
SMALLEST = 1e-30
"""Least squared change of a token, for its weight: padding may have none."""
SLOTS = 4096
"""Draws at a position; tokens whose ids leave the same rest share one."""

Key = tuple[str, int]
"""A block, and a layer."""
Problem = tuple[Tensor, Tensor]
"""Covariance (I, I) of the inputs of a block's last projection, and its weight (O, I)."""
NoteChanges = Callable[[str, int, Changes], None]
"""Takes in a block, its layer, and what the loss changes by without each of its inputs."""


def has_cost(anatomy: Anatomy, kind: str) -> bool:
    """Return whether this module can score units of a kind.

    Experts that read all tokens, weighed before, do not show their neurons.
    """
    experts = anatomy.family.experts
    hidden = kind == "expert_neurons" and experts is not None and experts.weighed_first
    return kind in READ and not hidden


def surgeon_scores(probe: Probe) -> Scores:
    """Return the cost (N,) of removing each unit: a sum over the tokens of a sequence.

    Each process goes through all layers with its share of the text. As many layers as there are
    processes are then solved side by side, one by each.
    """
    changes = input_changes(probe)
    text = Layerwise(probe.anatomy, probe.hooks, None, probe.plain_batches, probe.team)
    found = {kind: torch.zeros(probe.layout.units(kind)) for kind in probe.kinds}
    layers = range(len(probe.anatomy.layers))
    for first in layers[:: probe.team.size]:
        together = layers[first : first + probe.team.size]
        own: dict[int, dict[str, Problem]] = {}
        for layer in together:
            problems = _advance(probe, text, changes, layer, found)
            if probe.team.is_mine(layer):
                own[layer] = problems
            del problems  # large
        for layer, problems in own.items():
            _solve(probe, changes, layer, problems, found)
        for _ in together:
            probe.progress()
    probe.team.add_up(found.values())
    return found


def _advance(
    probe: Probe, text: Layerwise, changes: Mapping[Key, Tensor], layer: int, found: Scores
) -> dict[str, Problem]:
    """Return what `_solve` takes of a layer's blocks; its experts are solved at once, by all."""
    blocks = [block for block, i in changes if i == layer and block != "experts"]
    mixture = probe.anatomy.mixture(layer) if ("experts", layer) in changes else None
    with noting_calls(mixture.experts if mixture else None) as routed:
        covariances = text.advance(layer, {x: _reader(probe, x, layer) for x in blocks})
    check_finite([x.diagonal() for x in covariances.values()], "surgeon")
    if mixture is not None:
        changes_2EF = changes["experts", layer].view(2, *mixture.sizes)
        with gathered(probe.anatomy.layers[layer]):
            costs_EF = neuron_costs(mixture, routed, changes_2EF, probe.team)
        if probe.team.is_mine(layer):
            _put(probe, found, "expert_neurons", layer, costs_EF.flatten())
    linears = {x: probe.anatomy.linear(layer, probe.anatomy.ends(layer)[x]) for x in blocks}
    return {x: (covariances[x], weight_of(cast(nn.Linear, linears[x]))) for x in blocks}


def _solve(
    probe: Probe,
    changes: Mapping[Key, Tensor],
    layer: int,
    problems: dict[str, Problem],
    found: Scores,
) -> None:
    """Put the costs of a layer's units in their places; the covariances are used up."""
    tokens = sum(batch_BT.numel() for batch_BT in probe.plain_batches)
    for block in list(problems):
        covariance_II, weight_OI = problems.pop(block)
        covariance_II.div_(tokens)
        lengths_I = lengths(changes[block, layer], covariance_II.diagonal())
        kinds = [kind for kind in probe.kinds if READ[kind] == block]
        counts = [probe.layout.sizes[kind][layer] for kind in kinds]
        costs = removal_costs(weight_OI.float(), lengths_I, covariance_II, counts)
        for kind, costs_U in zip(kinds, costs, strict=True):
            _put(probe, found, kind, layer, costs_U)


def _put(probe: Probe, found: Scores, kind: str, layer: int, costs_U: Tensor) -> None:
    found[kind].split(probe.layout.sizes[kind])[layer].copy_(costs_U)


def draw_tokens(chances_BTK: Tensor, tokens_BTK: Tensor, generator: torch.Generator) -> Tensor:
    """Return numbers of tokens (B, T) below K, drawn by their probabilities.

    The luck of a token goes with its id, so probabilities that are rounded otherwise, and so
    ordered otherwise, seldom change what is drawn.

    Args:
        chances_BTK: probabilities.
        tokens_BTK: the ids of the tokens.
        generator: draws.
    """
    shape, device = (*chances_BTK.shape[:2], SLOTS), chances_BTK.device
    luck_BTS = torch.rand(shape, generator=generator, device=device).log_().neg_()  # exponential
    return (chances_BTK / luck_BTS.gather(-1, tokens_BTK % SLOTS)).argmax(-1)


def drawn_slope(logits_BTV: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient (B, T, V) of the loss by the logits, for tokens that the model draws.

    The loss is the sum over sequences of each one's mean cross entropy, of the likeliest tokens at
    `TEMPERATURE`, times that.
    """
    top_BTK, tokens_BTK = logits_BTV.topk(min(LIKELIEST, logits_BTV.shape[-1]))
    slope_BTK = (top_BTK.float() / TEMPERATURE).softmax(-1)
    drawn_BT1 = draw_tokens(slope_BTK, tokens_BTK, generator).unsqueeze(-1)
    slope_BTK.scatter_add_(-1, drawn_BT1, slope_BTK.new_full((1, 1, 1), -1).expand_as(drawn_BT1))
    slope_BTK.div_(logits_BTV.shape[1])
    return torch.zeros(logits_BTV.shape, device=slope_BTK.device).scatter_(
        -1, tokens_BTK, slope_BTK
    )


def input_changes(probe: Probe) -> dict[Key, Tensor]:
    """Return the squared changes (2, I) of the loss without each input of last projections.

    The loss is a sequence's mean, and the changes are averaged over sequences. To first order, a
    change is the input times the loss's gradient by it; see `lengths`. Where a token loses much, it
    loses less than that. So tokens are weighed by what all inputs change of them: to the power of
    `SOFTER` in place of 2. What all inputs change together stays the same.
    """
    device = probe.anatomy.model.device
    generator = torch.Generator(device).manual_seed(probe.seed)
    total: dict[Key, Tensor] = {}
    for key, module in reversed(_readers(probe).items()):  # in one order in all processes
        width = math.prod(module.sizes) if isinstance(module, Mixture) else module.in_features
        total[key] = torch.zeros(2, width, dtype=sum_dtype(device), device=device)
    plain = torch.zeros((), dtype=sum_dtype(device), device=device)
    noted: dict[Key, Changes] = {}

    def note_changes(block: str, layer: int, changes: Changes) -> None:
        noted[block, layer] = changes

    with _gradients_of_inputs(probe, note_changes):
        for i, batch_BT in enumerate(probe.batches):
            if probe.team.is_mine(i):
                _back(probe, batch_BT.to(device), generator)
                squares_M = torch.stack([x.squares_S for x in noted.values()]).sum(0)
                weight_M = squares_M.clamp(min=SMALLEST) ** (SOFTER / 2 - 1)
                for key, changes in noted.items():
                    total[key] += changes.weighed(weight_M)
                plain += squares_M.sum()
                noted.clear()
            else:
                _pass_over(probe, batch_BT, generator)
            probe.progress()
    probe.team.add_up((*total.values(), plain))
    sequences = sum(len(batch_BT) for batch_BT in probe.batches)
    softened = torch.stack([alone_I.sum() for alone_I, _ in total.values()]).sum()
    scale = plain / softened / LOSS_SCALE**2 / sequences
    return {key: (changes_2I * scale).float() for key, changes_2I in total.items()}


def _back(probe: Probe, ids_BT: Tensor, generator: torch.Generator) -> None:
    # A function of its own: no logits of one batch are left when the next one runs.
    logits_BTV = probe.anatomy.model(input_ids=ids_BT, use_cache=False).logits
    check_finite([logits_BTV], "surgeon")  # no tokens could be drawn from others
    slope_BTV = drawn_slope(logits_BTV.detach(), generator).mul_(LOSS_SCALE)
    logits_BTV.backward(slope_BTV.to(logits_BTV.dtype))


def _pass_over(probe: Probe, ids_BT: Tensor, generator: torch.Generator) -> None:
    """Draw as many tokens as another process does, so that later batches get the same ones."""
    chances_BT1 = torch.ones(*ids_BT.shape, 1, device=generator.device)
    draw_tokens(chances_BT1, chances_BT1.long(), generator)


@contextmanager
def _gradients_of_inputs(probe: Probe, note: NoteChanges) -> Iterator[None]:
    """Pass on how the loss changes without each input, while a backward pass forms gradients."""
    with ExitStack() as stack:
        stack.enter_context(probe.anatomy.embedding.register_forward_hook(_require_gradients))
        for key, module in _readers(probe).items():
            note_own = partial(note, *key)
            length = probe.batches[0].shape[1]
            if isinstance(module, Mixture):
                watched = watched_experts(module, length, note_own)
                stack.enter_context(in_place_of([module.experts], [watched]))
            else:
                hook = _noting_changes(length, note_own)
                stack.enter_context(module.register_forward_pre_hook(hook))
        yield


def _noting_changes(
    length: int, note: Callable[[Changes], None]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0].detach()

        def found(grad: Tensor) -> None:
            # Some models (OPT) read the tokens of all sequences in a row.
            changes_MI = (grad.float() * inputs).view(-1, inputs.shape[-1])

            def weighed(weight_M: Tensor) -> Tensor:
                softened_MI = changes_MI * weight_M.sqrt().unsqueeze(-1)
                whole_BI = softened_MI.view(-1, length, softened_MI.shape[-1]).sum(1)
                return torch.stack([x.square().sum(0) for x in (softened_MI, whole_BI)])

            note(Changes(changes_MI.square().sum(-1), weighed))

        args[0].register_hook(found)

    return hook


def _require_gradients(_: nn.Module, __: Any, output: Tensor) -> None:
    # Weights are frozen, so gradients reach the layers from what they read.
    output.requires_grad_(True)


def _readers(probe: Probe) -> dict[Key, Any]:
    """Return what reads the units of each block and layer: its last projection, or its experts."""
    found = {}
    for block in dict.fromkeys(READ[kind] for kind in probe.kinds):
        for layer in range(len(probe.anatomy.layers)):
            experts = block == "experts"
            own = probe.anatomy.mixture(layer) if experts else _reader(probe, block, layer)
            if own is not None:
                found[block, layer] = own
    return found


def _reader(probe: Probe, block: str, layer: int) -> Any:
    return probe.anatomy.projection(layer, probe.anatomy.ends(layer)[block])
