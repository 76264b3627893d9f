"""How much copying from context loses without a unit of attention, measured by cutting it.

Few-shot prompts, summaries and retrieval live on copying. A few heads carry it, and blocks of prose
hardly exercise them. Where the model copies it is sure, so gradients are near zero: to every local
score these heads look cheap. So each unit near the threshold is cut alone, and its loss is measured
on repeated random tokens. Source: induction heads, Olsson et al. 2022 (arXiv 2209.11895).

A unit of a layer changes nothing in front of that layer, so each run begins there, from what the
dense model gave.

Shape suffixes: S sequences, T tokens, B units that are cut at a time, R tokens whose logits are
compared at a time, V vocabulary, N units of one kind in the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nuteprune.gates.masks import Masks
from nuteprune.gates.scores import Probe, Scores
from nuteprune.model.forwards import giving, last_logits, noting_outputs
from nuteprune.model.weights import is_sharded
from nuteprune.simulated import alike, number, scored

SEQUENCES, LENGTH = 3, 100
"""Number of sequences, and tokens of each before they repeat. 300 tokens tell the groups apart."""
COPIES = 0.1
"""Share of the repeat's tokens that a model gets right if it copies at all."""
NEAR = 1.25
"""Units are measured if they score below this times the highest score that is removed."""
AT_ONCE = 4
"""Units that are cut at a time, each in a sequence of its own."""
CACHED, LAUNCHED = 2**18, 2**24
"""How many logits are compared at a time: in fp32 they fit a processor's caches, and on
accelerators they keep one kernel busy."""
LOWEST_ID = 1 / 50
"""Share of the vocabulary that is left out at its beginning: bytes and special tokens."""


@dataclass(frozen=True)
class DenseRun:
    """The dense model on sequences that repeat.

    Args:
        ids_ST: the sequences, each followed by itself.
        logits_STV: the model's logits of each repeat.
        sums_ST: the logarithms of the sums of their exponentials, fp32.
        outputs: those of each layer.
    """

    ids_ST: Tensor
    logits_STV: Tensor
    sums_ST: Tensor
    outputs: list[Any]

    @property
    def copied(self) -> float:
        """The share of the repeats' tokens that the model gets right."""
        repeats_ST = self.ids_ST[:, self.ids_ST.shape[1] // 2 :]
        return number((self.logits_STV.argmax(-1) == repeats_ST).float().mean())


def copying_kept(probe: Probe, scores: Scores) -> Scores:
    """Raise the scores of attention units that copying needs; none if the model cannot copy.

    score = max(score, median(score) x loss / median(loss)), with the loss of `copying_losses`: the
    worse of both on one scale, since a mean would hide a switch. Medians are over the measured
    units: all, or, if the probe knows the target, those near the threshold. Units that are raised
    stay, so others go instead, and are measured too.

    Args:
        probe: the model; `progress` is told of each layer once.
        scores: kind -> (N,), of all kinds that are scored. Units that cost nothing have gone.
    """
    kinds: list[str] = [kind for kind in ("heads", "kv_groups") if kind in scores]
    if not kinds:
        return dict(scores)
    dense = run_dense(probe)
    raised = dict(scores)
    losses = {kind: torch.zeros_like(scores[kind]) for kind in kinds}
    measured = {kind: torch.zeros_like(scores[kind], dtype=torch.bool) for kind in kinds}
    while dense.copied >= COPIES:
        new = {k: x & ~measured[k] for k, x in _near_the_cut(probe, raised, kinds).items()}
        if not any(new_N.any() for new_N in new.values()):
            return raised
        for kind, new_N in new.items():
            losses[kind] += copying_losses(probe, kind, dense, new_N)
            at_N = measured[kind].logical_or_(new_N)
            if at_N.any():
                loss_N, own_N = losses[kind], scores[kind]
                relative_N = loss_N / loss_N[at_N].median().clamp(min=1e-12)
                raised[kind] = torch.maximum(own_N, own_N[at_N].median() * relative_N)
        probe = replace(probe, progress=lambda: None)  # it has been told of all layers
    for _ in range(len(kinds) * len(probe.anatomy.layers)):
        probe.progress()
    return raised


def _near_the_cut(probe: Probe, scores: Scores, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Return which units (N,) are near the threshold, or below; all units without a target."""
    there = {kind: scores[kind] > 0 for kind in kinds}
    if probe.cut_by is None:
        return there
    left = probe.cut_by(scores)
    near = {}
    for kind, there_N in there.items():
        gone_N = there_N & (left[kind] == 0)
        dearest = scores[kind][gone_N].max() if gone_N.any() else 0.0
        near[kind] = there_N & (scores[kind] < NEAR * dearest)
    return near


def repeated(vocabulary: int, length: int, seed: int) -> Tensor:
    """Return random token ids (S, 2 x length), each sequence followed by itself."""
    generator = torch.Generator().manual_seed(seed)
    lowest = int(vocabulary * LOWEST_ID)
    ids_ST = torch.randint(lowest, vocabulary, (SEQUENCES, length), generator=generator)
    return torch.cat([ids_ST, ids_ST], dim=1)


@torch.no_grad()
def run_dense(probe: Probe) -> DenseRun:
    """Run the dense model on the sequences of `repeated`."""
    model = probe.anatomy.model
    vocabulary, device = probe.anatomy.embedding.weight.shape[0], model.device
    positions = getattr(model.config, "max_position_embeddings", None) or 2 * LENGTH
    ids_ST = repeated(vocabulary, min(LENGTH, positions // 2), probe.seed).to(device)
    with probe.hooks.using(None), noting_outputs(probe.anatomy.layers) as outputs:
        logits_STV = _repeats(probe, ids_ST)
    return DenseRun(ids_ST, logits_STV, torch.stack([_sums(x) for x in logits_STV]), outputs)


def _sums(logits_TV: Tensor) -> Tensor:
    """Return the logarithms (T,) of the sums of the logits' exponentials, in fp32."""
    return torch.cat([x.float().logsumexp(-1) for x in logits_TV.split(_rows(logits_TV))])


def _repeats(probe: Probe, ids_BT: Tensor) -> Tensor:
    """Return logits (B, T, V) of the repeat's tokens."""
    length = ids_BT.shape[1] // 2
    # The last token of the first time predicts the first one of the repeat.
    return last_logits(probe.anatomy.model, ids_BT, length + 1)[:, :-1]


@torch.no_grad()
def copying_losses(probe: Probe, kind: str, dense: DenseRun, units_N: Tensor) -> Tensor:
    """Return the KL divergence (N,) from the dense model when each of some units is cut alone.

    Args:
        probe: the model; `progress` is told of each layer.
        kind: `heads` or `kv_groups`.
        dense: the run of the model with all units.
        units_N: whether a unit is one of them.

    Returns:
        The mean over the repeats' tokens, in nats, on the CPU; 0 for the other units.
    """
    layout, first = probe.layout, 0
    losses_N, dealt = torch.zeros(layout.units(kind)), 0
    for layer, size in enumerate(layout.sizes[kind]):
        here = first + units_N[first : first + size].nonzero().flatten()
        groups = here.split(AT_ONCE) if len(here) else ()
        own = [units for i, units in enumerate(groups, dealt) if probe.team.is_mine(i)]
        for units in alike(own, dense.logits_STV):
            losses_N[units] = scored(losses_without(probe, kind, layer, units, dense))
        first, dealt = first + size, dealt + len(groups)
        probe.progress()
    fewer = probe.team.rank >= (dealt % probe.team.size or probe.team.size)
    if fewer and is_sharded(probe.anatomy.layers[0]):  # each needs as many passes
        losses_without(probe, kind, layer, torch.tensor([first - 1]), dense)
    probe.team.add_up([losses_N])
    return losses_N


@torch.no_grad()
def losses_without(probe: Probe, kind: str, layer: int, units_B: Tensor, dense: DenseRun) -> Tensor:
    """Return the mean KL divergence (B,) for some units of a layer, each cut alone.

    The layers before it give what they gave in the dense model.
    """
    device, count = dense.ids_ST.device, len(units_B)
    values_BN = torch.ones(count, probe.layout.units(kind), device=device)
    values_BN[torch.arange(count), units_B] = 0
    masks = Masks(probe.layout, {kind: values_BN})
    losses_B = torch.zeros(count, device=device)
    before = probe.anatomy.layers[:layer]
    for s, ids_T in enumerate(dense.ids_ST):
        given = [_of_sequence(output, s, count) for output in dense.outputs[:layer]]
        with probe.hooks.using(masks), giving(before, given):
            cut_BTV = _repeats(probe, ids_T.expand(count, -1))
        whole = (dense.logits_STV[s], dense.sums_ST[s])
        losses_B += torch.stack([mean_kl(*whole, cut_TV) for cut_TV in cut_BTV])
    return losses_B / len(dense.ids_ST)


def _of_sequence(output: Any, sequence: int, count: int) -> Any:
    """Return what a layer gave for one sequence, `count` times in a batch."""
    if isinstance(output, tuple):
        return (_of_sequence(output[0], sequence, count), *output[1:])
    return output[sequence].expand(count, -1, -1)


def mean_kl(p_TV: Tensor, sums_T: Tensor, q_TV: Tensor) -> Tensor:
    """Return the mean over tokens of KL(p || q), given logits, and `_sums` of p.

    KL = sum p (z_p - z_q) + logsumexp(z_q) - logsumexp(z_p): no logarithm of each chance is held.
    """
    total, rows = torch.zeros((), device=q_TV.device), _rows(q_TV)
    parts = (x.split(rows) for x in (p_TV, sums_T, q_TV))
    for p_RV, sum_R, q_RV in alike(list(zip(*parts, strict=True)), q_TV):
        p_RV, q_RV = p_RV.float(), q_RV.float()
        total += (q_RV.logsumexp(-1) - sum_R).sum()
        total += (p_RV.sub(sum_R[:, None]).exp_() * p_RV.sub(q_RV)).sum()
    return total / len(q_TV)


def _rows(logits_TV: Tensor) -> int:
    """Return for how many tokens logits are compared at a time."""
    most = CACHED if logits_TV.device.type == "cpu" else LAUNCHED
    return max(1, most // logits_TV.shape[1])
