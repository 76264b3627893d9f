from __future__ import annotations

import math

import pytest
import torch

from nuteprune.progressive import gates as hard_concrete

LOG_ALPHA = torch.linspace(-4.5, 4.5, 19, dtype=torch.float64)


def test_draws_by_hand() -> None:
    """Noise of 1/2 adds nothing: z = clip(1.2 sigmoid(1.5 log alpha) - 0.1)."""
    log_alpha = torch.tensor([0.0, math.log(4), -math.log(4), 4.0, -4.0])
    drawn = hard_concrete.sample(log_alpha, torch.full((5,), 0.5))
    expected = [0.5, 1.2 * 8 / 9 - 0.1, 1.2 / 9 - 0.1, 1.0, 0.0]  # 4 ** 1.5 is 8
    torch.testing.assert_close(drawn, torch.tensor(expected), rtol=0, atol=1e-6)
    # Noise u adds its logit to log alpha.
    shifted = hard_concrete.sample(torch.tensor([0.7]), torch.tensor([0.8]))
    same = hard_concrete.sample(torch.tensor([0.7 + math.log(4)]), torch.tensor([0.5]))
    torch.testing.assert_close(shifted, same)


def test_keep_probability_is_the_share_of_draws_that_are_not_zero() -> None:
    random = torch.Generator().manual_seed(0)
    uniform = torch.rand(40_000, len(LOG_ALPHA), generator=random, dtype=torch.float64)
    drawn = hard_concrete.sample(LOG_ALPHA.expand_as(uniform), uniform)
    share = (drawn > 0).double().mean(0)
    expected = hard_concrete.keep_probability(LOG_ALPHA)
    assert (share - expected).abs().max() < 4 * 0.5 / math.sqrt(40_000)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert (drawn == 1).any()
    by_hand = 1 / (1 + 11 ** (-2 / 3))  # at log alpha 0: sigmoid(2/3 ln 11)
    assert hard_concrete.keep_probability(torch.zeros(())) == pytest.approx(by_hand)


def test_draws_have_gradients_where_they_are_soft() -> None:
    log_alpha = torch.tensor([0.0, 4.0, -4.0], requires_grad=True)
    hard_concrete.sample(log_alpha, torch.full((3,), 0.5)).sum().backward()
    # d/dx of 1.2 sigmoid(1.5 x) at 0 is 1.2 x 1.5 / 4; clipped gates have none
    torch.testing.assert_close(log_alpha.grad, torch.tensor([0.45, 0.0, 0.0]))


def test_noiseless_value_by_hand() -> None:
    value = hard_concrete.test_value(torch.tensor([0.0, math.log(2), -math.log(2)]))
    up = 2**1.2 / (1 + 2**1.2)
    torch.testing.assert_close(value, torch.tensor([0.5, up, 1 - up]))


def test_penalty_and_its_slopes_by_hand() -> None:
    lagrangian = hard_concrete.Lagrangian()
    with torch.no_grad():
        lagrangian.lambda1.fill_(-2.0)
        lagrangian.lambda2.fill_(10.0)
    sparsity = torch.tensor(0.2, requires_grad=True)
    penalty = lagrangian(sparsity, 0.3)
    penalty.backward()
    assert penalty.item() == pytest.approx(-2 * -0.1 + 10 * 0.01)
    assert sparsity.grad == pytest.approx(-2 + 2 * 10 * -0.1)
    # Ascent on these makes a model that is too dense pay more and more for it.
    assert lagrangian.lambda1.grad == pytest.approx(-0.1)
    assert lagrangian.lambda2.grad == pytest.approx(0.01)
