"""LLM-Pruner's choice of units, as a method beside the package's own, for tables.

Its code takes the same share of each layer but the first four and the last two, which its authors
chose by hand, and at 20 % nothing of attention here: less than one KV group would go.
Source: Ma, Fang and Wang 2023 (arXiv 2305.11627), `param_first` with groups summed up.

Shape suffixes: B batch, T tokens, V vocabulary, O outputs and I inputs of a projection, D hidden
width, N neurons of the whole model, U of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nuteprune.gates.importance import Method
from nuteprune.gates.scores import LOSS_SCALE, Probe, Scores, losses_of, ranks

NAME = "llm-pruner"
FIRST, LAST = 4, 2
"""Layers at the beginning and at the end that lose nothing."""


def llm_pruner(probe: Probe) -> Scores:
    """Sum of |weight x its gradient| over the weights of a neuron, ranked within its layer."""
    anatomy, sizes = probe.anatomy, probe.layout.sizes["neurons"]
    linears = [anatomy.linear(i, x) for i in range(len(sizes)) for x in anatomy.family.mlp]
    flat = [x.weight.requires_grad_() for x in linears if x is not None]
    total = [torch.zeros_like(x, dtype=torch.float32) for x in flat]
    for ids_BT in probe.own_batches():
        logits_BTV = anatomy.model(input_ids=ids_BT, use_cache=False).logits
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        grads = torch.autograd.grad(loss * LOSS_SCALE, flat)
        for sum_OI, grad_OI in zip(total, grads, strict=True):
            sum_OI += grad_OI
    changes = [(x.detach() * y).abs() for x, y in zip(flat, total, strict=True)]
    for weight in flat:
        weight.requires_grad_(False)
    size = len(anatomy.family.mlp)
    found = [_of_neurons(*changes[i : i + size]) for i in range(0, len(changes), size)]
    ranks_N = ranks(probe.layout, "neurons", torch.cat(found))
    kept = [i < FIRST or i >= len(sizes) - LAST for i in range(len(sizes))]
    kept_N = torch.tensor(kept).repeat_interleave(torch.tensor(sizes))
    return losses_of(probe.budget, {"neurons": ranks_N.masked_fill(kept_N, 2.0)})


def _of_neurons(*changes: Tensor) -> Tensor:
    """Return sums (U,) over a layer's projections, of which the last one reads the neurons."""
    *wide, down_DU = changes
    return torch.stack([*(x_UD.sum(1) for x_UD in wide), down_DU.sum(0)]).sum(0)


METHOD = Method(llm_pruner, ("neurons",), "at 20 % its code takes no attention", ("neurons",))
