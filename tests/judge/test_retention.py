from __future__ import annotations

import math
import random
import statistics

import pytest

from nuteprune.judge.retention import retention, retention_stderr, retentions


def test_is_the_share_of_the_dense_figure() -> None:
    assert retention(0.6, 0.8, higher_is_better=True) == pytest.approx(75)
    assert retention(20.0, 15.0, higher_is_better=False) == pytest.approx(75)


@pytest.mark.parametrize(("ours", "dense"), [(0.5, 0.0), (math.inf, 2.0), (1.0, math.nan)])
def test_is_unknown_where_a_ratio_says_nothing(ours: float, dense: float) -> None:
    assert retention(ours, dense, higher_is_better=True) is None


def test_the_mean_is_that_of_the_figures_not_of_the_percentages() -> None:
    kept = retentions({"a": 5.0, "b": 4.0}, {"a": 5.0, "b": 2.0, "c": 9.0})
    assert kept == pytest.approx({"a": 100, "b": 50, "mean": 100 * 7 / 9})
    assert retentions({"a": 5.0}, {"b": 2.0}) == {}


def test_the_same_answers_have_no_error_and_one_question_tells_none() -> None:
    answers = [1.0, 0.0, 1.0, 1.0]
    assert retention_stderr([answers], [answers]) == pytest.approx(0)
    assert retention_stderr([[1.0]], [[1.0]]) is None
    assert retention_stderr([[1.0, 0.0]], [[0.0, 0.0]]) is None
    with pytest.raises(ValueError, match="zip"):
        retention_stderr([[1.0, 0.0, 1.0]], [[1.0, 0.0]])


def test_the_error_is_what_drawing_the_questions_again_gives() -> None:
    """The delta method against a bootstrap, on two tasks of unlike size, answers correlated."""
    draw = random.Random(0)

    def questions(count: int, easy: float) -> list[tuple[float, float]]:
        made = []
        for _ in range(count):
            dense = float(draw.random() < easy)
            same = draw.random() < 0.85
            made.append((dense if same else float(draw.random() < easy), dense))
        return made

    tasks = [questions(600, 0.7), questions(250, 0.4)]

    def ratio(asked: list[list[tuple[float, float]]]) -> float:
        means = [[statistics.fmean(x[i] for x in task) for task in asked] for i in (0, 1)]
        return 100 * statistics.fmean(means[0]) / statistics.fmean(means[1])

    again = [ratio([draw.choices(task, k=len(task)) for task in tasks]) for _ in range(1500)]
    ours, dense = ([[x[i] for x in task] for task in tasks] for i in (0, 1))
    error = retention_stderr(ours, dense)
    assert error == pytest.approx(statistics.stdev(again), rel=0.08)
    # Unpaired, the error would be far larger.
    shuffled = [draw.sample(task, len(task)) for task in ours]
    unpaired = retention_stderr(shuffled, dense)
    assert unpaired is not None
    assert unpaired > 1.5 * error  # type: ignore[operator]
