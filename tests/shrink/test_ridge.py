from __future__ import annotations

import pytest
import torch

from nuteprune.shrink import ridge
from nuteprune.shrink.ridge import RIDGE, Fit, low_rank, ridge_fit, ridge_of


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def correlated(rows: int = 400, columns: int = 12) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=random)
    return torch.randn(rows, columns, generator=random) @ mix


def test_ridge_fit_is_least_squares_as_the_ridge_vanishes(monkeypatch) -> None:
    monkeypatch.setattr(ridge, "RIDGE", 0.0)
    x, weight = correlated(), torch.randn(5, 12)
    mask = torch.ones(12)
    mask[[1, 4, 7]] = 0
    kept = mask > 0
    fitted = ridge_fit(weight, x.T @ x, mask, weight)
    best = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    assert torch.allclose(fitted[:, kept], best, atol=1e-3)
    assert (fitted[:, ~kept] == 0).all()


def test_few_tokens_for_each_input_mean_more_ridge() -> None:
    assert ridge_of(1536, None) == ridge_of(1536, 144 * 256) == RIDGE
    assert ridge_of(1536, 36 * 256) == pytest.approx(0.3)
    assert ridge_of(1536, 1) == 1


def test_ridge_fit_leaves_alone_what_makes_up_for_the_loss_already() -> None:
    x, target = correlated(), torch.randn(5, 12)
    mask = torch.ones(12)
    mask[[1, 4, 7]] = 0
    kept = mask > 0
    learned = torch.randn(5, 12)  # its own columns that are gone must not matter
    learned[:, kept] = torch.linalg.lstsq(x[:, kept], x @ target.T).solution.T
    fitted = ridge_fit(learned, x.T @ x, mask, target)
    assert torch.allclose(fitted[:, kept], learned[:, kept], atol=1e-3)


def test_ridge_fit_undoes_soft_masks() -> None:
    x, weight = correlated(), torch.randn(5, 12)
    mask = torch.ones(12)
    mask[2], mask[3] = 0.0, 0.5
    fitted = ridge_fit(weight, x.T @ x, mask, weight)
    plain = ridge_fit(weight, x.T @ x, (mask > 0).float(), weight)
    assert torch.allclose((x * mask) @ fitted.T, x @ plain.T, atol=1e-3)


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
