"""How much of the dense model's quality is left, in percent: pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence


def retention(ours: float, dense: float, *, higher_is_better: bool) -> float | None:
    """Return what a model keeps of the dense one's figure, in percent; more is better.

    Args:
        ours: its figure.
        dense: the dense model's.
        higher_is_better: whether more is better; of perplexity, less is.

    Returns:
        100 where both are alike; None where the ratio says nothing (a zero or infinite figure).
    """
    over, under = (ours, dense) if higher_is_better else (dense, ours)
    if under <= 0 or not math.isfinite(over) or not math.isfinite(under):
        return None
    return 100 * over / under


def retentions(ours: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, float | None]:
    """Return the retention of each perplexity that both models have, and on average.

    Args:
        ours: text -> perplexity.
        dense: text -> perplexity of the dense model.

    Returns:
        Text -> percent, and `mean`: the retention of the mean figures, the way published averages
        are compared; left out where the models have no text in common.
    """
    names = [name for name in ours if name in dense]
    kept = {x: retention(ours[x], dense[x], higher_is_better=False) for x in names}
    if names:
        means = (statistics.fmean(x[name] for name in names) for x in (ours, dense))
        kept["mean"] = retention(*means, higher_is_better=False)
    return kept


def retention_stderr(
    ours: Sequence[Sequence[float]], dense: Sequence[Sequence[float]]
) -> float | None:
    """Return the standard error of the retention of a mean over tasks, in percentage points.

    Both models answer the same questions, so what they share cancels: the error of the ratio R of
    two means is, by the delta method, that of the mean of `ours - R dense` over the dense mean.
    Tasks count alike, whatever their size, and are independent.

    Args:
        ours: for each task the model's figure on each question.
        dense: the dense model's, on the same questions in the same order.

    Returns:
        The error; None where it cannot be told: a task of fewer than two questions, or the dense
        model has none right.

    Raises:
        ValueError: if both do not have as many questions.
    """
    mean_dense = statistics.fmean(statistics.fmean(task) for task in dense)
    if mean_dense <= 0 or min(map(len, dense)) < 2:
        return None
    ratio = statistics.fmean(statistics.fmean(task) for task in ours) / mean_dense
    variance = 0.0
    for mine, theirs in zip(ours, dense, strict=True):
        left = [x - ratio * y for x, y in zip(mine, theirs, strict=True)]
        variance += statistics.variance(left) / len(left)
    return 100 * math.sqrt(variance) / len(dense) / mean_dense
