"""The covariance of a projection's inputs, summed up batch by batch.

Shape suffixes: M tokens, I inputs of a projection, P columns of a panel, D other values of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nuteprune.processes import Team
from nuteprune.simulated import once

PANEL = 256
"""Columns of a product of inputs that are formed at once."""
LEAST = 1e-12
"""The least root mean square that a token's inputs are divided by."""


class Covariance:
    """The sum of X^T X (I, I) over inputs X (..., I), in fp32; the lower triangle is computed.

    Args:
        size: how many inputs there are.
        device: where they are.
        weight_OI: where a norm follows the projection, its weight. The norm divides each token's
            output by its root mean square, so the token's inputs are divided too: else a few
            tokens of large outputs would drown all others.
    """

    def __init__(self, size: int, device: torch.device, weight_OI: Tensor | None = None) -> None:
        self._size, self._device, self._weight_OI = size, device, weight_OI
        self._sum_II: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Take in a batch of inputs (..., I)."""
        rows_MI = inputs.reshape(-1, inputs.shape[-1]).float()
        if self._weight_OI is not None:
            output_MO = nn.functional.linear(inputs, self._weight_OI.to(inputs)).flatten(0, -2)
            size_M1 = output_MO.float().square().mean(-1, keepdim=True).sqrt()
            rows_MI = rows_MI / size_M1.clamp(min=LEAST)
        size = self._size
        if self._sum_II is None:
            self._sum_II = rows_MI.new_zeros(size, size)
        sum_II = self._sum_II

        def multiply() -> None:
            for start in range(0, size, PANEL):
                panel_MP = rows_MI[:, start : start + PANEL]
                sum_II[start:, start : start + PANEL].addmm_(rows_MI[:, start:].T, panel_MP)

        once(multiply, rows_MI, *rows_MI.shape)

    def whole(self, team: Team) -> Tensor:
        """Return both triangles of the sum over all processes."""
        sum_II = self._sum_II
        if sum_II is None:  # no batch is this process's
            sum_II = torch.zeros(self._size, self._size, device=self._device)
        team.add_up([sum_II])

        def mirror() -> None:
            for start in range(0, len(sum_II), PANEL):
                below = slice(start + PANEL, None)
                panel = slice(start, start + PANEL)
                sum_II[panel, below] = sum_II[below, panel].T

        once(mirror, sum_II, len(sum_II))
        return sum_II


def product(values_MD: Tensor, inputs_MI: Tensor) -> Tensor:
    """Return values^T inputs (D, I) of a batch, in fp32.

    Of inputs in bf16 it is computed in bf16, twice as fast. That rounds an entry by 0.4 %, which a
    covariance of few tokens would not stand: it may then have no inverse.
    """
    dtype = torch.bfloat16 if inputs_MI.dtype == torch.bfloat16 else torch.float32
    return (values_MD.to(dtype).T @ inputs_MI.to(dtype)).float()
