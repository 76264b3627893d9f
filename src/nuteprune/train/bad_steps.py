"""Steps whose gradients are not finite: they are counted and dropped."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nuteprune.errors import RunFailed

MOST_IN_ROW = 3
"""A run stops after so many steps in a row that were not finite, when it next logs."""


class BadSteps:
    """Counts steps that are not finite without waiting for the device; reading a count waits.

    Args:
        device: where gradients are.
    """

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), dtype=torch.long, device=device)
        self._in_row = torch.zeros((), dtype=torch.long, device=device)

    @property
    def total(self) -> int:
        """Bad steps so far."""
        return int(self._total)

    @property
    def in_row(self) -> int:
        """Bad steps since the last good one."""
        return int(self._in_row)

    def restore(self, total: int, in_row: int) -> None:
        """Go back to the counts that a checkpoint knew."""
        self._total.fill_(total)
        self._in_row.fill_(in_row)

    def drop(self, norm: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Count a step by the norm of its gradients, and set them to 0 if it is not finite.

        The optimizer then goes on by its momentum alone.

        Args:
            norm: total norm of all of them before they were clipped, a scalar.
            parameters: those whose gradients are dropped.
        """
        bad = ~torch.isfinite(norm)
        self._total += bad
        self._in_row = (self._in_row + 1) * bad
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = torch.where(bad, torch.zeros_like(parameter.grad), parameter.grad)

    def check(self, step: int, learning_rate: float) -> None:
        """Stop a run that does not come back to finite steps.

        Args:
            step: the one that has ended.
            learning_rate: of the settings.

        Raises:
            RunFailed: after `MOST_IN_ROW` steps in a row.
        """
        if self.in_row >= MOST_IN_ROW:
            raise RunFailed(
                f"the loss or its gradients were not finite in {self.in_row} steps in a row, up to "
                f"step {step}; lower learning_rate (now {learning_rate}), or use --dtype float32"
            )
