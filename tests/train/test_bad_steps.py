"""How steps that are not finite are counted."""

from __future__ import annotations

import torch

from nuteprune.train.distiller import BadSteps


def test_a_good_step_ends_a_row_of_bad_ones() -> None:
    counts = BadSteps(torch.device("cpu"))
    seen = []
    for norm in (float("inf"), float("nan"), 1.0, float("inf")):
        counts.drop(torch.tensor(norm), [])
        seen.append(counts.read())
    assert seen == [[1, 1], [2, 2], [2, 0], [3, 1]]
    counts.restore([2, 1])
    assert counts.read() == [2, 1]
