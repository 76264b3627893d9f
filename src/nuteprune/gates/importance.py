"""One-shot importance: the loss that removing each unit is expected to cost, by several methods.

Every method answers with scores in the form that the allocator takes: additive losses, of which the
fewest per parameter go. `METHODS` is the list of them. Scores that estimate a loss (`fisher`,
`surgeon`) are taken as they are. Those that only rank come through `scores.losses_of`, so that the
allocator follows their ranking, made as each paper makes it: `wanda` and the scores of experts rank
within a layer, so that all layers lose the same share; `taylor` within a kind; `flap` and
`similarity` across all.

Shape suffixes: B batch, T tokens, M = B x T, D hidden width, I inputs of a projection, N units of
one kind in the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nuteprune.errors import UserError
from nuteprune.gates.copying_losses import copying_kept
from nuteprune.gates.masks import Layout, Masks
from nuteprune.gates.scores import LOSS_SCALE, Probe, Scores, chance, in_order, losses_of, ranked
from nuteprune.gates.surgeon import INPUTS, has_cost, surgeon_scores
from nuteprune.model.family import BLOCK_KINDS, GATE_KINDS
from nuteprune.simulated import number, scored

if TYPE_CHECKING:
    from nuteprune.gates.activations import Watched


def random(probe: Probe) -> Scores:
    """Random: u x parameters of the unit, u uniform in (0, 1); every part loses about its share.

    Any method has to do better than this.
    """
    return chance(probe.budget, probe.kinds, probe.seed)


def wanda(probe: Probe) -> Scores:
    """Weights times the norm of what they multiply, summed over a unit, ranked within its layer.

    S_u = sum over columns j of u, rows i: |W_ij| |X_j|_2, W the output or down projection and X its
    inputs on calibration text. Source: Sun et al. 2023 (arXiv 2306.11695); its structured form,
    with the same share from every layer, is Wanda-sp of An et al. 2023 (arXiv 2312.11983).
    """
    from nuteprune.gates.activations import means_of_inputs

    def metric(watched: Watched) -> Tensor:
        return scored(watched.weight().abs().sum(0)) * watched.norm

    # Units of a layer have as many columns each, so that means rank as sums do.
    return ranked(probe, means_of_inputs(probe, metric))


def flap(probe: Probe) -> Scores:
    """How much a unit's outputs fluctuate, standardised in each layer, ranked across the model.

    S_j = Var(X_j) |W_:j|_2^2 for each input j of the output and down projections, in attention the
    square of that; a unit's score is the mean z-score of its S within the projection. Source:
    FLAP's WIFV metric and adaptive structure, An et al. 2023 (arXiv 2312.11983). The square is that
    of its public code (CASIA-LMC-Lab/FLAP): it removes less attention, which did better
    (docs/log.md). The refit that all methods share replaces FLAP's bias compensation.
    """
    from nuteprune.gates.activations import means_of_inputs

    def metric(watched: Watched) -> Tensor:
        norm_I = scored(watched.weight().square().sum(0))
        metric_I = watched.variance * norm_I
        metric_I /= metric_I.mean().clamp(min=1e-30)  # z-scores are the same; squares stay in range
        if watched.block == "attn_block":
            metric_I.square_()
        return (metric_I - metric_I.mean()) / metric_I.std().clamp(min=1e-30)

    return losses_of(probe.budget, means_of_inputs(probe, metric))


def taylor(probe: Probe) -> Scores:
    """First-order change of the loss: mean over sequences of |d loss / d mask|, ranked by kind.

    The gradient of a unit's mask at 1 is the sum of w d loss / d w over the unit's weights in the
    output or down projection: LLM-Pruner's vector-wise importance of that projection, but of each
    sequence by itself, and without gradients of weights (docs/log.md has both side by side).
    Ranks run over all units of a kind in the model, as in LLM-Pruner's global option, the better by
    far where tried. So attention and MLPs lose the same share, but layers do not. As losses the
    values would mislead: gradients of many small units cancel, but their sizes add up.
    Source: Molchanov et al. 2017 (arXiv 1611.06440); Ma, Fang and Wang 2023 (arXiv 2305.11627).
    """
    return ranked(probe, _mask_gradients(probe, torch.abs), by_layer=False)


def fisher(probe: Probe) -> Scores:
    """Diagonal Fisher information of the masks: mean over sequences of (d loss / d mask)^2.

    Half of it is the second-order estimate of the loss that setting a mask to 0 costs, so scores
    compare across layers and kinds as they are. Gradients are taken per sequence, at no extra cost,
    by giving each sequence of a batch its own masks.
    Source: Theis et al. 2018 (arXiv 1801.05787); Kwon et al. 2022 (arXiv 2204.09656).
    """
    return _mask_gradients(probe, torch.square)


def surgeon(probe: Probe) -> Scores:
    """Loss that removing a unit costs once the refit makes up for it with the other inputs.

    tr(S_u ([C^-1]_uu)^-1): S_u is the second moment of the loss's gradients by the unit's outputs,
    C that of all inputs of the projection that reads them. A unit is cheap if the loss does not
    depend on it, or if the refit can predict it from the other inputs.
    The cheapest units of a layer go first; the costs of the others are then computed without them.
    Neurons of routed experts: see `gates.surgeon_costs`. Hidden width, blocks and
    experts have no refit, so they keep their Fisher score, which estimates the same loss. Which
    experts of a layer go first is the order of `reconstruction`, which did better (docs/moe.md).
    Gradients do not show which attention copies from context, so that is measured; see
    `copying_kept`. The first attention goes last of all; see `first_attention_last`.
    See `gates.surgeon`. Source: LLM Surgeon (van der Ouderaa et al. 2024, arXiv 2312.17244) and
    ZipLM (Kurtic, Frantar and Alistarh 2023, arXiv 2302.04089).
    """
    read = tuple(kind for kind in probe.kinds if has_cost(probe.anatomy, kind))
    others = tuple(kind for kind in probe.kinds if kind not in read)
    scores = surgeon_scores(replace(probe, kinds=read)) if read else {}
    if others:
        scores |= fisher(replace(probe, kinds=others, progress=lambda: None))
    if "experts" in others:
        from nuteprune.gates.expert_scores import removal_order

        places = removal_order(replace(probe, progress=lambda: None))
        scores["experts"] = in_order(probe.layout.sizes["experts"], scores["experts"], places)
    scores = first_attention_last(probe.layout, copying_kept(probe, scores))
    return {kind: scores[kind] for kind in probe.kinds}


def first_attention_last(layout: Layout, scores: Scores) -> Scores:
    """Raise the scores of the first attention's heads and KV groups above those of all others.

    The first attention is that of the first layer that has any (`Shape.first_attention`). There the
    first token of a sequence sees only itself. That tells the token from all others, and makes it
    the attention sink: a hidden state hundreds of times as large as the rest. Without a sink the
    whole sequence is lost. The sink is a switch, so gradients of a dense model do not show it, and
    a few blocks of text have too few first tokens.
    Source: attention sinks, Xiao et al. 2023 (arXiv 2309.17453); massive activations, Sun et al.
    2024 (arXiv 2402.17762); measured in docs/log.md.
    """
    raised, first = dict(scores), layout.shape.first_attention
    for kind in {"heads", "kv_groups"} & scores.keys():
        parts = list(scores[kind].split(layout.sizes[kind]))
        others = [x.max() for i, x in enumerate(parts) if i != first and len(x)]
        parts[first] = parts[first] + max(others, default=0)
        raised[kind] = torch.cat(parts)
    return raised


def similarity(probe: Probe) -> Scores:
    """How much a block turns the residual stream: 1 - mean over tokens of cos(before, after).

    The block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853), of attention and MLP blocks
    on their own as in He et al. 2024 (arXiv 2406.15786); ranked across the model, whatever the
    block's size. It says nothing about parts of a block, so other kinds of gates are refused.
    """
    from nuteprune.gates.activations import watching_streams

    count = len(probe.anatomy.layers)
    total = {kind: torch.zeros(count, dtype=torch.float64) for kind in BLOCK_KINDS}
    tokens = torch.zeros(count, dtype=torch.long)

    def add_turns(layer: int, before_MD: Tensor, between_MD: Tensor, after_MD: Tensor) -> None:
        tokens[layer] += len(before_MD)
        for kind, pair in (
            ("attn_block", (before_MD, between_MD)),
            ("mlp_block", (between_MD, after_MD)),
        ):
            total[kind][layer] += number((1 - torch.cosine_similarity(*pair)).sum())

    with watching_streams(probe.anatomy, add_turns):
        probe.read()
    probe.team.add_up((tokens, *total.values()))
    found = {}
    for kind in probe.kinds:
        present = torch.tensor(probe.layout.sizes[kind], dtype=torch.bool)
        found[kind] = (total[kind] / tokens.clamp(min=1)).float()[present]
    return losses_of(probe.budget, found)


def reconstruction(probe: Probe) -> Scores:
    """Experts go one after another, each time the one whose removal changes the output least.

    L(R) = sum over tokens x of |y_R(x) - y(x)|_2^2, with y what the layer's routed experts give,
    and y_R what they give once the router has no rows for the experts R: the next best stand in,
    and weights are made to sum to 1 where the family does that. The next expert e to go is the one
    with the least L(R and e); its rank in the layer is its place in this order. REAP, in contrast,
    takes an expert's output as lost, and does not see that one of two equal experts has to stay.
    Source: the reconstruction loss of Lu et al. 2024 (NAEE, arXiv 2402.14800), who try all sets of
    experts; here greedily, in at most 24 rounds.
    """
    from nuteprune.gates.expert_scores import removal_order

    for _ in probe.batches:  # the other text is read
        probe.progress()
    return ranked(probe, {"experts": removal_order(probe)})


def reap(probe: Probe) -> Scores:
    """Router-weighted expert activation: how much an expert contributes, ranked within its layer.

    S_j = mean over the tokens x that are routed to expert j of g_j(x) |f_j(x)|_2, with g_j the
    weight that the layer gives the expert (after the top k are made to sum to 1, where the family
    does that) and f_j(x) what the expert puts out. An expert that no token goes to has 0.
    Source: REAP, equation 9 of Lasby et al. 2025 (arXiv 2510.13999); its public code
    (CerebrasResearch/reap) gives the same numbers with `renormalize_router_weights`.
    """
    from nuteprune.gates.expert_scores import hearing_experts

    with hearing_experts(probe.anatomy) as heard:
        probe.read()
    probe.team.add_up(x for layer in heard for x in (layer.tokens_E, layer.loud_E))
    return ranked(probe, {"experts": torch.cat([layer.reap() for layer in heard])})


@dataclass(frozen=True)
class Method:
    """An entry of the list of methods.

    Args:
        score: from a probe to losses.
        kinds: the kinds of gates that it can score.
        reason: why not the others.
        default_kinds: the kinds that it takes where none are named; None: what the model has.
        reads: how many times `calibration_blocks` it reads; 0: it needs no text. Gradients are
            taken on a part of it; see `stages.score.with_gradients`.
        by_layer: whether it also takes all of it through the layers one by one; each layer is told
            to the probe's `progress`.
        cuts: whether it also cuts attention units one by one; each layer is told again.
    """

    score: Callable[[Probe], Scores]
    kinds: tuple[str, ...] = GATE_KINDS
    reason: str = ""
    default_kinds: tuple[str, ...] | None = None
    reads: int = 1
    by_layer: bool = False
    cuts: bool = False


_ONLY_INPUTS = "it judges the inputs of the output and down projections"
_EXPERTS = ("experts",)
_ONLY_EXPERTS = "it judges whole routed experts"
METHODS: dict[str, Method] = {
    "random": Method(random, reads=0),
    "wanda": Method(wanda, tuple(INPUTS), _ONLY_INPUTS),
    "flap": Method(flap, tuple(INPUTS), _ONLY_INPUTS),
    "taylor": Method(taylor),
    "fisher": Method(fisher),
    "surgeon": Method(surgeon, reads=3, by_layer=True, cuts=True),
    "reconstruction": Method(
        reconstruction, _EXPERTS, _ONLY_EXPERTS, default_kinds=_EXPERTS, by_layer=True
    ),
    "reap": Method(reap, _EXPERTS, _ONLY_EXPERTS, default_kinds=_EXPERTS),
    "similarity": Method(
        similarity,
        BLOCK_KINDS,
        "it compares the residual stream before and after whole blocks",
        default_kinds=BLOCK_KINDS,
    ),
}


def check_scorable(name: str, kinds: Sequence[str]) -> None:
    """Refuse kinds of gates that a method cannot score.

    Raises:
        UserError: naming the kinds that it can.
    """
    method = METHODS[name]
    for kind in kinds:
        if kind not in method.kinds:
            raise UserError(
                f"{name} cannot score gates on {kind}: {method.reason}; use --gates "
                f"{','.join(method.kinds)}, or another method"
            )


def _mask_gradients(probe: Probe, measure: Callable[[Tensor], Tensor]) -> Scores:
    """Return the mean over sequences of a measure of the gradients of their masks."""
    model, layout, kinds = probe.anatomy.model, probe.layout, probe.kinds
    device = model.device
    total = {kind: torch.zeros(layout.units(kind), dtype=torch.float64) for kind in kinds}
    for ids_BT in probe.own_batches():
        ids_BT = ids_BT.to(device)
        leaves = {
            kind: torch.ones(len(ids_BT), layout.units(kind), device=device, requires_grad=True)
            for kind in kinds
        }
        with probe.hooks.using(Masks(layout, leaves)):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        # Not the model's own loss: a mixture may add the balance of its routers.
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        # The model's loss is a mean over sequences; what is wanted are gradients of their sum.
        grads = torch.autograd.grad(loss * len(ids_BT) * LOSS_SCALE, list(leaves.values()))
        for kind, grad in zip(kinds, grads, strict=True):
            total[kind] += scored(measure(grad.float() / LOSS_SCALE).sum(0))
    probe.team.add_up(total.values())
    sequences = sum(map(len, probe.batches))
    return {kind: (value / max(1, sequences)).float() for kind, value in total.items()}
