from __future__ import annotations

import pytest
import torch

from nuteprune.shrink.least_squares import Fit
from nuteprune.shrink.low_rank import low_rank
from tests.shrink.test_least_squares import correlated


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_low_rank_is_the_best_of_its_rank_in_outputs() -> None:
    x, base = correlated(), torch.randn(6, 12)
    target = base + torch.randn(6, 12) * 0.1
    fit = Fit(target, x.T @ x)
    whole = torch.linalg.svdvals(x @ (target - base).T)
    for rank in (1, 3, 6):
        out_OR, in_RI = low_rank(fit, base, rank)
        error = (x @ (target - base - out_OR @ in_RI).T).norm()
        assert error <= whole[rank:].norm() * 1.05 + 1e-2


def test_low_rank_leaves_rounding_out() -> None:
    x, base = correlated(), torch.randn(6, 12)
    target = base + torch.randn(6, 2) @ torch.randn(2, 12)
    out_OR, in_RI = low_rank(Fit(target, x.T @ x), base, 5)
    assert out_OR.shape == (6, 2)
    torch.testing.assert_close(out_OR @ in_RI, target - base, rtol=1e-3, atol=1e-3)
