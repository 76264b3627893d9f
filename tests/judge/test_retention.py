from __future__ import annotations

import math

import pytest

from nuteprune.judge.retention import retention, retentions


def test_is_the_share_of_the_dense_figure() -> None:
    assert retention(0.6, 0.8, higher_is_better=True) == pytest.approx(75)
    assert retention(20.0, 15.0, higher_is_better=False) == pytest.approx(75)


@pytest.mark.parametrize(("ours", "dense"), [(0.5, 0.0), (math.inf, 2.0), (1.0, math.nan)])
def test_is_unknown_where_a_ratio_says_nothing(ours: float, dense: float) -> None:
    assert retention(ours, dense, higher_is_better=True) is None


def test_the_mean_is_that_of_the_figures_not_of_the_percentages() -> None:
    ours, dense = {"a": 0.5, "b": 0.2}, {"a": 0.5, "b": 0.4}
    kept = retentions(ours, dense, {"a": True, "b": True})
    assert kept["a"] == pytest.approx(100)
    assert kept["b"] == pytest.approx(50)
    assert kept["mean"] == pytest.approx(100 * 0.7 / 0.9)


def test_figures_that_point_different_ways_have_no_mean() -> None:
    figures = {"acc": 0.5, "perplexity": 9.0}
    kept = retentions(figures, figures, {"acc": True, "perplexity": False})
    assert set(kept) == {"acc", "perplexity"}
