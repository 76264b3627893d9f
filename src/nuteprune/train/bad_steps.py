"""Steps with non-finite loss or gradients: counted on the device, their gradients dropped."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOST_IN_ROW = 3
"""A run stops after so many steps in a row that were not finite."""


class BadSteps:
    """Counts without waiting for the device; reading a count waits.

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
            parameters: whose gradients are dropped.
        """
        bad = ~torch.isfinite(norm)
        self._total += bad
        self._in_row = (self._in_row + 1) * bad
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = torch.where(bad, torch.zeros_like(parameter.grad), parameter.grad)
