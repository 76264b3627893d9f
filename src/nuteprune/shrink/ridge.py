"""Ridge regression of a projection's weight on the inputs that are left.

W' = W C[:, kept] (C[kept, kept] + ridge)^-1 with C = X^T X over the inputs X.

Shape suffixes: O rows, I columns, K kept columns.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nuteprune.simulated import usual

RIDGE = 1e-1
"""Ridge: what is added to the diagonal of C, as a share of itself; more with few tokens."""
TOKENS_EACH = 18
"""With fewer tokens for each input the ridge grows by as much, up to 1: else a fit to little text
fits what is particular to it; see docs/log.md."""
LEAST = 1e-30
"""Ridge of an input that is always 0: the weights that read it stay as they are."""


def ridge_fit(
    weight_OI: Tensor,
    covariance_II: Tensor,
    mask_I: Tensor,
    target_OI: Tensor,
    more_OI: Tensor | None = None,
    tokens: int | None = None,
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
    """
    kept_I = mask_I > 0
    kept_K = kept_I.nonzero().flatten()
    missing_OI = (weight_OI * kept_I).neg_().add_(target_OI) @ covariance_II
    if more_OI is not None:
        missing_OI += more_OI
    missing_OK = missing_OI[:, kept_K]
    del missing_OI
    ridge = ridge_of(len(covariance_II), tokens)
    update_KO = _solve(covariance_II, kept_K, missing_OK.T, ridge)
    del missing_OK
    fitted_OI = torch.zeros_like(weight_OI)
    fitted_OI[:, kept_K] = (weight_OI[:, kept_K] + update_KO.T) / mask_I[kept_K].float()
    return fitted_OI


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


def _solve(covariance_II: Tensor, kept_K: Tensor, wanted_KO: Tensor, ridge: float) -> Tensor:
    # What is factored is not held: it is large, and hardly ever wanted again.
    factor_KK, failed = torch.linalg.cholesky_ex(with_ridge(covariance_II, kept_K, ridge))
    if usual(failed == 0):
        return torch.cholesky_solve(wanted_KO, factor_KK)
    # Rounding, or values that are not finite.
    return cast(Tensor, torch.linalg.solve(with_ridge(covariance_II, kept_K, ridge), wanted_KO))
