"""The best low-rank form of a fit, where packed base weights cannot be replaced.

Shape suffixes: O rows, I columns, K kept columns, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nuteprune.shrink.least_squares import RIDGE, Fit, with_ridge

NOTHING = 1e-4
"""A direction of the update smaller than this share of the largest is rounding."""


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
