"""Masks of routed experts: which may be chosen, and how their outputs are weighed.

A removed expert has no row in its router, so none may win here: the router is run with the rows of
the experts that stay, as it will be once the others are cut out. Whatever a family does with its
scores (softmax before or after the choice, sigmoids with a correction, groups) is done so.

Shape suffixes: B batch, S tokens of the batch, K experts of a token, P = S x K, E experts, F
neurons of each, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from nuteprune.model.anatomy import Mixture, without_lora
from nuteprune.model.forwards import Value, replaced
from nuteprune.model.lora import delta_of
from nuteprune.simulated import usual

Mask = Callable[[], Tensor | None]
"""Called at each pass; returns multipliers (N,), or (B, N) for each sequence; None: all are
open."""


def kept_experts(mask_E: Tensor | None, least: int) -> Tensor | None:
    """Return which experts may be chosen: those above 0, and the first ones where too few are.

    Args:
        mask_E: multipliers (E,) or (B, E); an expert goes if it is at 0 for all sequences.
        least: how many a token is routed to.

    Returns:
        Their indices, None if all may.
    """
    if mask_E is None:
        return None
    live_E = (mask_E > 0).reshape(-1, mask_E.shape[-1]).any(0)
    if usual(live_E.all()):
        return None
    others = (~live_E).nonzero().flatten()
    live_E = live_E.index_fill(0, others[: max(0, least - int(live_E.sum()))], True)
    return live_E.nonzero().flatten()


class RoutedMasks:
    """Masks of a layer's experts, in forwards that take the place of the modules' own.

    Args:
        mixture: the experts.
        experts: multipliers of the experts; at 0 they cannot be chosen.
        neurons: multipliers of all neurons of the layer's experts, expert after expert.
    """

    def __init__(self, mixture: Mixture, experts: Mask, neurons: Mask) -> None:
        self._mixture, self._experts, self._neurons = mixture, experts, neurons
        self._route, self._compute = mixture.router.forward, mixture.experts.forward
        self._route_alone = without_lora(mixture.router).forward

    def route(self, hidden: Tensor) -> Any:
        """Compute what the router gives, of experts that may be chosen."""
        kept = kept_experts(self._experts(), self._mixture.per_token)
        if kept is None:
            return self._route(hidden)
        with rows_of(self._mixture.router, kept):
            found = self._route_alone(hidden)
        return self._of_all(found, kept)

    def _of_all(self, found: Any, kept: Tensor) -> Any:
        """Return what a router gives, from what it gave of the experts that are kept."""
        logits, *rest, index_SK = found
        return (self._wide(logits, kept, -torch.inf), *rest, kept[index_SK])

    def _wide(self, values: Tensor, kept: Tensor, fill: float) -> Tensor:
        """Return values of all experts, for those who record what a router gives."""
        wide = (*values.shape[:-1], self._mixture.sizes[0])
        return values.new_full(wide, fill).index_copy(-1, kept, values)

    def compute(self, hidden: Tensor, index_SK: Tensor, weight_SK: Tensor) -> Tensor:
        """Compute what the experts give, under the masks."""
        if (mask := self._experts()) is not None:
            row = _sequence_of_tokens(mask, index_SK)
            weight_SK = weight_SK * mask.view(-1, mask.shape[-1])[row, index_SK].to(weight_SK)
        if (mask := self._neurons()) is None:
            return cast(Tensor, self._compute(hidden, index_SK, weight_SK))
        mask_BEF = mask.view(-1, *self._mixture.sizes)
        row_P = _sequence_of_tokens(mask, index_SK).expand_as(index_SK).reshape(-1)

        def masked(inner_PF: Tensor, expert_P: Tensor, pair_P: Tensor) -> Tensor:
            return inner_PF * mask_BEF[row_P[pair_P], expert_P].to(inner_PF)

        return computed_with(self._mixture.experts, masked, hidden, index_SK, weight_SK)


class WeighedMasks(RoutedMasks):
    """`RoutedMasks` for experts that all read all tokens, weighed before; the same arguments.

    The experts' input is (E x S, D): expert after expert, 0 where a token is not theirs.
    """

    def _of_all(self, found: Any, kept: Tensor) -> Any:
        scores, logits = found
        return self._wide(scores, kept, 0.0), self._wide(logits, kept, -torch.inf)

    def compute(self, read: Tensor, *_: Any) -> Tensor:
        """Compute what the experts give, under the masks."""
        count, width = self._mixture.sizes
        given, neurons = read.view(count, -1, read.shape[-1]), self._neurons()
        if neurons is None:
            output = self._compute(read).view_as(given)
        else:
            # Where sequences have masks of their own, each goes through other weights.
            rows = neurons.view(-1, count, width)
            parts = given.chunk(len(rows), 1)
            output = torch.cat(
                [self._masked(part, row) for part, row in zip(parts, rows, strict=True)], 1
            )
        if (mask := self._experts()) is not None:
            mask_BE = mask.view(-1, count)
            each = given.shape[1] // len(mask_BE)
            output = output * mask_BE.T.repeat_interleave(each, 1).unsqueeze(-1).to(output)
        masked: Tensor = output.view_as(read)
        return masked

    def _masked(self, given: Tensor, neurons_EF: Tensor) -> Tensor:
        """Return what experts put out (E, S, D) with masks in their down projections."""
        down = self._mixture.down.path.rpartition(".")[2]
        own = self._mixture.experts._parameters
        masked = own[down] * neurons_EF.unsqueeze(-1).to(own[down])
        with replaced([(own, down, masked)]):
            return cast(Tensor, self._compute(given.flatten(0, 1))).view_as(given)


Neurons = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Called with the neurons' values (P, F) of pairs of a token and its expert, sorted by expert; the
experts (P,); and each pair's place (P,) among those of (S, K). Returns what goes on in their
place."""


def computed_with(
    experts: Any, neurons: Neurons, hidden_SD: Tensor, index_SK: Tensor, weight_SK: Tensor
) -> Tensor:
    """Return the experts' output (S, D), with something else in place of their neurons."""
    own = experts._apply_gate
    # transformers sorts (token, expert) pairs by expert, and asks for all at once.
    expert_P, pair_P = torch.sort(index_SK.reshape(-1))
    with replaced([(vars(experts), "_apply_gate", lambda x: neurons(own(x), expert_P, pair_P))]):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_SD, index_SK, weight_SK)  # type: ignore[no-any-return]


def _sequence_of_tokens(mask: Tensor, index_SK: Tensor) -> Tensor:
    """Return each token's row (S, 1) of masks (B, N) or (N,)."""
    rows = mask.shape[0] if mask.dim() == 2 else 1
    each = len(index_SK) // rows
    return torch.arange(rows, device=index_SK.device).repeat_interleave(each).unsqueeze(-1)


def rows_of(router: nn.Module, kept: Tensor) -> AbstractContextManager[None]:
    """Return a context where a router has rows of some experts alone, and LoRA's in its own."""
    plain, added = without_lora(router), {}
    if isinstance(router, LoraLayer) and not router.disable_adapters:
        added["weight"] = delta_of(router)
    values: list[Value] = [(vars(plain), "num_experts", len(kept))]
    for own in (plain._parameters, plain._buffers):
        for name, tensor in own.items():
            if tensor is not None and len(tensor) == plain.num_experts:
                if name in added:
                    tensor = tensor + added[name].to(tensor)
                values.append((own, name, tensor.index_select(0, kept)))
    return replaced(values)
