"""Steps whose loss or gradients are not finite: counted on the device, their gradients dropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


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

    def drop(self, parameters: Sequence[nn.Parameter]) -> None:
        """Count a step by its gradients, and set them to 0 if one is not finite.

        The optimizer then goes on by its momentum alone.

        Args:
            parameters: those that have gradients.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        bad = ~torch.isfinite(torch.nn.utils.get_total_norm(grads))
        self._total += bad
        self._in_row = (self._in_row + 1) * bad
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = torch.where(bad, torch.zeros_like(parameter.grad), parameter.grad)
