"""Ridge regression of a weight to the inputs that are left, and its best low-rank form.

W' = W C[:, kept] (C[kept, kept] + ridge)^-1, with C = X^T X over the inputs X.

Shape suffixes: O rows of a weight, I columns, K kept columns, R rank, or rows fitted together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nuteprune.simulated import alike, usual

RIDGE = 1e-1
"""Ridge: what is added to the diagonal of C, as a share of itself; more with few tokens."""
TOKENS_EACH = 18
"""With fewer tokens for each input the ridge grows by as much, up to 1: else a fit to little text
fits what is particular to it; see docs/log.md."""
LEAST = 1e-30
"""Ridge of an input that is always 0: the weights that read it stay as they are."""
LEAST_ROWS, MOST_PARTS = 48, 64
"""Of a weight: rows that are fitted together at least, and parts that it is fitted in at most."""
NOTHING = 1e-4
"""A direction of the update smaller than this share of the largest is rounding."""


@dataclass(frozen=True)
class Fit:
    """A refitted weight.

    Args:
        weight_OI: the new weight, zero columns where inputs are gone, fp32.
        covariance_II: X^T X of the masked inputs that it was fitted on, fp32.
    """

    weight_OI: Tensor
    covariance_II: Tensor


def ridge_fit(
    weight_OI: Tensor,
    covariance_II: Tensor,
    mask_I: Tensor,
    target_OI: Tensor,
    more_OI: Tensor | None = None,
    tokens: int | None = None,
    together: int | None = None,
) -> Tensor:
    """Return the weight (O, I) that from the kept columns of X alone best gives X target^T + E.

    Soft masks are taken into account: the input is X * mask, and so is the fit.

    Args:
        weight_OI: the weight that the ridge pulls towards, fp32.
        covariance_II: X^T X of the unmasked inputs, fp32.
        mask_I: multipliers of the inputs, 0 where they are gone.
        target_OI: the weight whose outputs from all inputs the fit aims at, fp32.
        more_OI: E^T X, with E what it aims at beyond these outputs, fp32; None: nothing.
        tokens: rows of X; None: enough.
        together: how many rows of the weight are fitted together; None: all.
    """
    kept_I = mask_I > 0
    kept_K = kept_I.nonzero().flatten()
    solve = _solver(covariance_II, kept_K, ridge_of(len(covariance_II), tokens))
    fitted_OI = torch.zeros_like(weight_OI)

    def fit(rows: slice) -> None:
        missing_RI = (weight_OI[rows] * kept_I).neg_().add_(target_OI[rows]) @ covariance_II
        if more_OI is not None:
            missing_RI += more_OI[rows]
        update_KR = solve(missing_RI[:, kept_K].T)
        fitted_RK = (weight_OI[rows][:, kept_K] + update_KR.T) / mask_I[kept_K].float()
        fitted_OI[rows, kept_K] = fitted_RK

    size = together or len(weight_OI)
    for start in alike(range(0, len(weight_OI), size), weight_OI):
        fit(slice(start, start + size))
    return fitted_OI


def divided(rows: int) -> int:
    """Return how many rows of a weight are fitted together; it divides them.

    As many for any number of processes: rounding may depend on it.
    """
    least = max(LEAST_ROWS, -(-rows // MOST_PARTS))
    return next(size for size in range(min(least, rows), rows + 1) if rows % size == 0)


def ridge_of(inputs: int, tokens: int | None) -> float:
    """Return the ridge of a fit to so many tokens; None: enough."""
    return RIDGE if tokens is None else min(1.0, RIDGE * max(1.0, TOKENS_EACH * inputs / tokens))


def with_ridge(covariance_II: Tensor, kept_K: Tensor, ridge: float) -> Tensor:
    """Return C of the kept inputs (K, K), each input's own share added to its diagonal.

    So the fit does not depend on the scale of an input, and one massive activation
    does not pull the weights of all others back to where they were.
    """
    inner_KK = covariance_II[kept_K[:, None], kept_K]
    inner_KK.diagonal().mul_(1 + ridge).add_(LEAST)
    return inner_KK


def _solver(covariance_II: Tensor, kept_K: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    # What is factored is not held: it is large, and hardly ever wanted again.
    factor_KK, failed = torch.linalg.cholesky_ex(with_ridge(covariance_II, kept_K, ridge))
    if usual(failed == 0):
        return lambda wanted_KR: torch.cholesky_solve(wanted_KR, factor_KK)
    # Rounding, or values that are not finite.
    return partial(torch.linalg.solve, with_ridge(covariance_II, kept_K, ridge))


def low_rank(fit: Fit, base_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors B (O, R) and A (R, I) of the update from `base_OI` to the fit.

    They fit outputs on the calibration inputs, not weights: the singular values are
    those of (W' - W) C^1/2. R is `rank`, or less where fewer directions count.
    """
    kept_K = (fit.covariance_II.diagonal() > 0).nonzero().flatten()
    inner_KK = with_ridge(fit.covariance_II, kept_K, RIDGE).double()
    update_OK = (fit.weight_OI - base_OI.float())[:, kept_K].double()
    # Left singular vectors and values of U C^1/2, from U C U^T: many times cheaper than an SVD.
    squares_O, vectors_OO = torch.linalg.eigh(update_OK @ inner_KK @ update_OK.T)
    sizes_O = squares_O.clamp(min=0).sqrt().flip(0)
    left = vectors_OO.flip(1)[:, :rank][:, sizes_O[:rank] > NOTHING * sizes_O[0]]
    # B A = U U^T (W' - W): the projection onto the leading outputs.
    right = left.T @ update_OK
    size = right.norm(dim=1).clamp(min=1e-12).sqrt()
    inputs_RI = torch.zeros(len(size), base_OI.shape[1]).to(fit.weight_OI)
    inputs_RI[:, kept_K] = (right / size[:, None]).to(inputs_RI)
    return (left * size).to(fit.weight_OI), inputs_RI
