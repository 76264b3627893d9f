"""Losses: token KL and language-model loss without ever holding all logits; layer terms.

Shape suffixes: B batch, T tokens, S = T - 1, D hidden width, N tokens in all, C tokens of a chunk,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.model.anatomy import Anatomy
from nuteprune.simulated import alike

IGNORED = -100
"""Label of a token that is not learned."""
CHUNK_BYTES = 2**26
"""Logits of a chunk, for each role, as the head gives them."""
CHUNK_TOKENS = (32, 256)
"""Fewest and most tokens of a chunk: each reads the whole head; more than these gain nothing."""
ROW_ELEMENTS = 2**19
"""Logits in fp32 that are worked on at a time: on a processor its caches hold them, and the C
library gives their memory again without asking the system for zeroed pages."""
LEAST = 1e-3
"""What `unlikelihood` takes the other tokens' probability to be at least."""
ON_ACCELERATORS = 32
"""As a multiple of `ROW_ELEMENTS`, on other devices."""


@dataclass(frozen=True)
class Head:
    """A frozen language head: logits = cap(hidden @ weight.T / divisor).

    Args:
        weight: (V, D).
        bias: (V,) or None.
        divisor: divides the logits.
        softcap: bound c of c tanh(logits / c), None for no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    divisor: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, anatomy: Anatomy) -> Head:
        """Return a model's head."""
        head = anatomy.head
        return cls(head.weight, getattr(head, "bias", None), *anatomy.logit_scale())

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return logits (C, V) in fp32."""
        return self.finished(self.products(hidden_CD))

    def products(self, hidden_CD: Tensor) -> Tensor:
        """Return the products (C, V) with the weight, in its dtype."""
        return nn.functional.linear(hidden_CD.to(self.weight.dtype), self.weight, self.bias)

    def finished(self, products_CV: Tensor) -> Tensor:
        """Return logits (C, V) in fp32 of what `products` returned, which may be overwritten."""
        logits_CV = products_CV.float()
        if self.divisor != 1.0:
            logits_CV.div_(self.divisor)
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV

    def slopes(self, grad_CV: Tensor, logits_CV: Tensor) -> Tensor:
        """Return gradients (C, V) of the products, but for the divisor, from the logits'."""
        if self.softcap is None:
            return grad_CV
        return grad_CV * (1 - (logits_CV / self.softcap).square())

    def backward(self, slopes_CV: Tensor) -> Tensor:
        """Return gradients (C, D) of the hidden states from `slopes`."""
        grad_CD = (slopes_CV @ self.weight).float()
        return grad_CD if self.divisor == 1.0 else grad_CD / self.divisor


def _chunk_kl(ours_CV: Tensor, theirs_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(theirs || ours) (C,) and its gradient (C, V) by our logits; overwrites `theirs_CV`.

    KL = sum p (z_theirs - z_ours) + logsumexp(z_ours) - logsumexp(z_theirs), which takes one
    exponential per logit and few passes over memory. The largest logit gives logsumexp(z) as
    max z - ln max softmax(z).
    """
    p_CV, q_CV = torch.softmax(theirs_CV, dim=-1), torch.softmax(ours_CV, dim=-1)
    kl_C = ours_CV.amax(-1) - q_CV.amax(-1).log() - (theirs_CV.amax(-1) - p_CV.amax(-1).log())
    kl_C += torch.linalg.vecdot(p_CV, theirs_CV.sub_(ours_CV))
    return kl_C, q_CV.sub_(p_CV)


RowsLoss = Callable[[Tensor, Tensor | None, slice], tuple[Tensor, Tensor]]
"""Called with some tokens' logits (C, V), the teacher's logits of them if there is a teacher, and
the indices of the tokens; returns their losses (C,) and the gradients (C, V) by the logits, which
it does not change."""


class _ByChunk(torch.autograd.Function):
    """A weighted sum of losses whose logits are formed and dropped chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        teacher_ND: Tensor | None,
        weight_N: Tensor,
        head: Head,
        rows_loss: RowsLoss,
    ) -> Tensor:
        vocabulary, (fewest, most) = len(head.weight), CHUNK_TOKENS
        chunk = min(most, max(fewest, CHUNK_BYTES // (vocabulary * head.weight.itemsize)))
        elements = ROW_ELEMENTS * (1 if hidden_ND.device.type == "cpu" else ON_ACCELERATORS)
        rows = max(1, elements // vocabulary)
        total = torch.zeros((), device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND)
        for i in range(0, len(hidden_ND), chunk):
            part = slice(i, i + chunk)
            ours_CV = head.products(hidden_ND[part])
            theirs_CV = None if teacher_ND is None else head.products(teacher_ND[part])
            starts = range(0, len(ours_CV), rows)
            for j in alike(starts, ours_CV):
                here = slice(j, j + rows)
                at = slice(i + j, i + j + len(ours_CV[here]))
                logits_CV = head.finished(ours_CV[here])
                others_CV = None if theirs_CV is None else head.finished(theirs_CV[here])
                loss_C, slope_CV = rows_loss(logits_CV, others_CV, at)
                total += (weight_N[at] * loss_C).sum()
                ours_CV[here] = head.slopes(slope_CV, logits_CV)  # in place of the products
            # Weighted after the product with the head: a row there is narrower.
            grad_ND[part] = head.backward(ours_CV).mul_(weight_N[part].unsqueeze(-1))
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0], None, None, None, None


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
        teacher_BTD: what the teacher's head reads; no gradients.
        head: the frozen language head that both share.
        weight_BT: weight of each token, 0 for padding.
        temperature: softening of both distributions.
    """
    weight_N = weight_BT.reshape(-1).float()
    width = student_BTD.shape[-1]
    teacher_ND = teacher_BTD.reshape(-1, width)

    def rows_loss(ours_CV: Tensor, theirs_CV: Tensor | None, _: slice) -> tuple[Tensor, Tensor]:
        assert theirs_CV is not None
        if temperature == 1.0:
            return _chunk_kl(ours_CV, theirs_CV)
        kl_C, slope_CV = _chunk_kl(ours_CV / temperature, theirs_CV.div_(temperature))
        return temperature**2 * kl_C, slope_CV.mul_(temperature)

    student_ND = student_BTD.reshape(-1, width)
    kl: Tensor = _ByChunk.apply(student_ND, teacher_ND, weight_N, head, rows_loss)
    # Divided here: of many tokens float16 would round each one's gradient to 0 before it is scaled.
    return kl / weight_N.sum().clamp(min=1e-9)


def language_model_loss(
    hidden_BTD: Tensor, head: Head, labels_BT: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """Return the cross entropy of learned next tokens; logits are formed chunk by chunk.

    Args:
        hidden_BTD: what the head reads (after the final norm).
        head: the frozen language head.
        labels_BT: the tokens; `IGNORED` where one is not learned.
        count: divides the sum over tokens; None: the number of learned tokens.
    """
    labels_BS = labels_BT[:, 1:]
    learned_BS = labels_BS != IGNORED
    hidden_ND, labels_N = hidden_BTD[:, :-1][learned_BS], labels_BS[learned_BS]

    def rows_loss(logits_CV: Tensor, _: Tensor | None, at: slice) -> tuple[Tensor, Tensor]:
        p_CV, label_C1 = torch.softmax(logits_CV, dim=-1), labels_N[at].unsqueeze(-1)
        all_C = logits_CV.amax(-1) - p_CV.amax(-1).log()  # logsumexp, as above
        loss_C = all_C - logits_CV.gather(-1, label_C1).squeeze(-1)
        return loss_C, p_CV.scatter_add_(-1, label_C1, -torch.ones_like(p_CV[:, :1]))

    weight_N = torch.ones_like(labels_N, dtype=torch.float32)
    loss: Tensor = _ByChunk.apply(hidden_ND, None, weight_N, head, rows_loss)
    return loss / (max(1, len(labels_N)) if count is None else count)


def unlikelihood(hidden_BTD: Tensor, head: Head, ids_BT: Tensor, repeats_BT: Tensor) -> Tensor:
    """Return -ln(1 - p) of the tokens that repeat, summed and divided by the number of all tokens.

    Source: Welleck et al. 2019 (arXiv 1908.04319).

    Args:
        hidden_BTD: what the head reads (after the final norm).
        head: the frozen language head.
        ids_BT: the tokens.
        repeats_BT: which of them repeat.
    """
    repeats_BS = repeats_BT[:, 1:]
    hidden_ND, ids_N = hidden_BTD[:, :-1][repeats_BS], ids_BT[:, 1:][repeats_BS]

    def rows_loss(logits_CV: Tensor, _: Tensor | None, at: slice) -> tuple[Tensor, Tensor]:
        p_CV, id_C1 = torch.softmax(logits_CV, dim=-1), ids_N[at].unsqueeze(-1)
        p_C1 = p_CV.gather(-1, id_C1)
        rest_C1 = (1 - p_C1).clamp(min=LEAST)
        slope_CV = p_CV.mul_(-1).scatter_add_(-1, id_C1, torch.ones_like(p_C1))
        return -rest_C1.log().squeeze(-1), slope_CV.mul_(p_C1 / rest_C1)

    weight_N = torch.ones_like(ids_N, dtype=torch.float32)
    loss: Tensor = _ByChunk.apply(hidden_ND, None, weight_N, head, rows_loss)
    return loss / ids_BT.numel()


def token_weights(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the weight (B, T) of each token of a batch in the losses: 0 for padding."""
    ids_BT, mask_BT = inputs["input_ids"], inputs.get("attention_mask")
    return torch.ones_like(ids_BT).float() if mask_BT is None else mask_BT.float()


def batch_counts(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return a batch's counts (3,): tokens distilled, tokens learned as next ones, sequences."""
    weight_BT = token_weights(inputs)
    return torch.stack(
        [weight_BT.sum(), weight_BT[:, 1:].sum(), weight_BT.new_tensor(len(weight_BT))]
    )


def amplified(loss: Tensor, factor: float) -> Tensor:
    """Return a loss of the same value with gradients `factor` times as large."""
    return loss if factor == 1 else loss + (factor - 1) * (loss - loss.detach())


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
