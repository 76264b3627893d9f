"""Distillation losses: token KL without ever holding all logits, and per-layer terms.

Shape suffixes: B batch, T tokens, D hidden width, N = B x T, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 2**22
"""Logits held at a time by each role on a processor (16 MiB in fp32): what its caches can hold, and
what the C library gives again without asking the system for zeroed pages; four times as many on an
accelerator."""
CHUNK_TOKENS = 32
"""Tokens of a chunk at least, however large the vocabulary: each chunk reads the whole head."""


@dataclass(frozen=True)
class Head:
    """A frozen language head: logits = cap(hidden @ weight.T / divisor).

    Args:
        weight: (V, D).
        bias: (V,) or None.
        divisor: what logits are divided by.
        softcap: bound c of c tanh(logits / c), None for no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    divisor: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return logits (C, V) in fp32."""
        logits_CV = nn.functional.linear(hidden_CD.to(self.weight.dtype), self.weight, self.bias)
        logits_CV = logits_CV.float()  # its own memory: `linear` has just made it
        if self.divisor != 1.0:
            logits_CV.div_(self.divisor)
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV

    def backward(self, grad_CV: Tensor, logits_CV: Tensor) -> Tensor:
        """Return gradients (C, D) of the hidden states from those of the logits."""
        if self.softcap is not None:
            grad_CV = grad_CV * (1 - (logits_CV / self.softcap).square())
        grad_CD = (grad_CV.to(self.weight.dtype) @ self.weight).float()
        return grad_CD if self.divisor == 1.0 else grad_CD / self.divisor


def _chunk_kl(ours_CV: Tensor, theirs_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(theirs || ours) (C,) and its slope (C, V) by our logits; uses `theirs_CV` up.

    KL = sum p (z_theirs - z_ours) + logsumexp(z_ours) - logsumexp(z_theirs), which takes one
    exponential per logit and few passes over memory. The largest logit gives logsumexp(z) as
    max z - ln max softmax(z).
    """
    p_CV, q_CV = torch.softmax(theirs_CV, dim=-1), torch.softmax(ours_CV, dim=-1)
    kl_C = ours_CV.amax(-1) - q_CV.amax(-1).log() - (theirs_CV.amax(-1) - p_CV.amax(-1).log())
    kl_C += torch.linalg.vecdot(p_CV, theirs_CV.sub_(ours_CV))
    return kl_C, q_CV.sub_(p_CV)


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        teacher_ND: Tensor,
        weight_N: Tensor,
        head: Head,
        temperature: float,
    ) -> Tensor:
        elements = CHUNK_ELEMENTS * (1 if student_ND.device.type == "cpu" else 4)
        chunk = max(CHUNK_TOKENS, elements // head.weight.shape[0])
        total = torch.zeros((), device=student_ND.device)
        grad_ND = torch.empty_like(student_ND)
        for i in range(0, len(student_ND), chunk):
            part = slice(i, i + chunk)
            logits_CV = head.logits(student_ND[part])
            ours_CV, theirs_CV = logits_CV, head.logits(teacher_ND[part])
            if temperature != 1.0:
                ours_CV, theirs_CV = ours_CV / temperature, theirs_CV.div_(temperature)
            kl_C, slope_CV = _chunk_kl(ours_CV, theirs_CV)
            total += temperature**2 * (weight_N[part] * kl_C).sum()
            # Weighted after the product with the head: a row there is narrower.
            slope_CD = head.backward(slope_CV, logits_CV)
            grad_ND[part] = slope_CD.mul_((temperature * weight_N[part]).unsqueeze(-1))
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0].to(grad_ND.dtype), None, None, None, None


def token_kl(
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    head: Head,
    weight_BT: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Return T^2 KL(teacher || student), averaged over tokens with given weights.

    Logits are formed chunk by chunk, for both roles, and turned into gradients of the student's
    hidden states at once: memory does not grow with tokens x vocabulary. Source: Hinton, Vinyals
    and Dean 2015 (arXiv 1503.02531); the paper's token-level term.

    Args:
        student_BTD: what the student's head reads (after the final norm).
        teacher_BTD: the same of the teacher; no gradients.
        head: the frozen language head that both share.
        weight_BT: weight of each token, 0 for padding.
        temperature: softening of both distributions.
    """
    weight_N = weight_BT.reshape(-1).float()
    weight_N = weight_N / weight_N.sum().clamp(min=1e-9)
    width = student_BTD.shape[-1]
    kl: Tensor = _TokenKL.apply(
        student_BTD.reshape(-1, width), teacher_BTD.reshape(-1, width), weight_N, head, temperature
    )
    return kl


def layer_mse(student_BTD: Tensor, teacher_BTD: Tensor, weight_BT: Tensor) -> Tensor:
    """Return the mean squared difference of hidden states (the paper's layer term)."""
    error_BT = (student_BTD.float() - teacher_BTD.float()).square().mean(-1)
    return (error_BT * weight_BT).sum() / weight_BT.sum().clamp(min=1e-9)


def layer_relative(student_BTD: Tensor, teacher_BTD: Tensor, weight_BT: Tensor) -> Tensor:
    """Return the squared difference of hidden states relative to the teacher's, per token.

    Unlike plain MSE, neither late layers nor tokens of huge norm drown the others.
    """
    teacher_BTD = teacher_BTD.float()
    error_BT = (student_BTD.float() - teacher_BTD).square().sum(-1)
    error_BT = error_BT / teacher_BTD.square().sum(-1).clamp(min=1e-6)
    return (error_BT * weight_BT).sum() / weight_BT.sum().clamp(min=1e-9)


LayerTerm = Callable[[Tensor, Tensor, Tensor], Tensor]
LAYER_TERMS: dict[str, LayerTerm] = {"mse": layer_mse, "relative": layer_relative}
