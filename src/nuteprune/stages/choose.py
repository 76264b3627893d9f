"""Choose: which units go, from their scores, at exactly the target; see `gates.allocate`."""

from __future__ import annotations

from nuteprune.gates.costs import Goal
from nuteprune.gates.masks import Masks
from nuteprune.gates.scores import Scores
from nuteprune.stages import Prunable


def choose(model: Prunable, scores: Scores, target: float | Goal) -> Masks:
    """Return the masks of least loss at a target, 0 and 1, on the model's device.

    Args:
        model: the model.
        scores: kind -> (N,), the loss that removing each unit is expected to cost.
        target: share of the decoder's projection parameters to remove, or another goal.

    Raises:
        UserError: if the gates cannot remove that much.
    """
    shape = model.allocator.shape(scores, target)
    return model.allocator.masks(shape, scores).to(model.device)
