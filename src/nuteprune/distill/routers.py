"""How near the student's routers stay to the teacher's: a loss term of mixtures of experts.

Shape suffixes: B batch, T tokens, S = B x T, E experts, L of them that the student keeps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.mixture import Mixture
from nuteprune.model.routing import kept_experts


def routing_kl(student_SL: Tensor, teacher_SL: Tensor, weight_S: Tensor, sigmoid: bool) -> Tensor:
    """Return KL(teacher || student) of a router's probabilities of the same experts.

    Where they are shares of one, the teacher's are made to sum to 1 over these experts, as in a
    model that has no others: softmax(its logits). Where each is a sigmoid, nothing is to sum up:
    the divergence is that of choosing an expert or not, averaged over experts.

    Args:
        student_SL: its logits.
        teacher_SL: the teacher's, -inf of an expert that it lacks; no gradients.
        weight_S: weight of each token in the mean, 0 for padding.
        sigmoid: whether each probability is a sigmoid.
    """
    ours_SL, theirs_SL = student_SL.float(), teacher_SL.float()
    theirs_SL = theirs_SL.clamp(min=torch.finfo(theirs_SL.dtype).min)
    if sigmoid:
        kl_S = _two_way_kl(ours_SL, theirs_SL).mean(-1)
    else:
        log_q_SL, p_SL = ours_SL.log_softmax(-1), theirs_SL.softmax(-1)
        kl_S = F.kl_div(log_q_SL, p_SL, reduction="none").sum(-1)
    return (kl_S * weight_S).sum() / weight_S.sum().clamp(min=1e-9)


def _two_way_kl(ours_SL: Tensor, theirs_SL: Tensor) -> Tensor:
    """Return p log(p / q) + (1 - p) log((1 - p) / (1 - q)) for p = sigmoid(theirs), q of ours."""
    p_SL = theirs_SL.sigmoid()
    cross_SL, own_SL = (
        F.binary_cross_entropy_with_logits(x_SL, p_SL, reduction="none")
        for x_SL in (ours_SL, theirs_SL)
    )
    return cross_SL - own_SL


class Routers:
    """Compares what each layer's router gives the two roles of a pass.

    Args:
        anatomy: the model.
        hooks: where masks multiply in it; those in use are the student's.
    """

    def __init__(self, anatomy: Anatomy, hooks: MaskHooks) -> None:
        every = ((i, anatomy.mixture(i)) for i in range(len(anatomy.layers)))
        self._mixtures = {i: mixture for i, mixture in every if mixture is not None}
        self._hooks = hooks
        self._logits: dict[int, list[Tensor]] = {}

    def watch(self) -> list[Any]:
        """Keep what routers give, the student first, until the handles returned are removed."""
        self._logits.clear()
        return [self._on_router(i, mixture) for i, mixture in self._mixtures.items()]

    def _on_router(self, layer: int, mixture: Mixture) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._logits.setdefault(layer, []).append(mixture.logits(output))

        return mixture.router.register_forward_hook(hook)

    def term(self, layer: int, weight_BT: Tensor) -> Tensor | None:
        """Return the divergence of a layer that both roles have gone through.

        Args:
            layer: its index.
            weight_BT: weight of each token, 0 for padding.

        Returns:
            None where no router is, or what it chooses is not heard of the student.
        """
        if layer not in self._mixtures:
            return None
        ours_SE, theirs_SE = self._logits.pop(layer)
        mixture, masks = self._mixtures[layer], self._hooks.masks
        if masks is not None:
            block_1, experts_E = (masks.part(kind, layer) for kind in ("mlp_block", "experts"))
            if block_1 is not None and not bool((block_1 > 0).any()):
                return None
            if (kept_L := kept_experts(experts_E, mixture.per_token)) is not None:
                ours_SE, theirs_SE = (x.index_select(1, kept_L) for x in (ours_SE, theirs_SE))
        return routing_kl(ours_SE, theirs_SE, weight_BT.flatten(), mixture.entry.sigmoid)
