"""Sums over what the last projection of a decoder layer's block reads.

These sums are in fp64, and are rounded to fp32 at their end. So they are the same in whatever order
the text's batches are added up, and so for any number of processes.

Shape suffixes: B batch, T tokens, M tokens of a batch, D hidden width, I inputs of a projection, O
its outputs, P columns of a panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.model.forwards import hidden_of
from nuteprune.processes import Team, sum_dtype
from nuteprune.simulated import once

PANEL = 256
"""Columns of a product of inputs that are formed at once."""
LEAST = 1e-12
"""The least root mean square that a token's inputs are divided by."""

Read = Sequence[Tensor]
"""The inputs (B, T, D) of a module, batch by batch."""


class Stop(Exception):
    """Raised to end a forward pass early."""


class Covariance:
    """The sum of X^T X (I, I) over inputs X (..., I); the lower triangle is computed.

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

    def add(self, inputs: Tensor) -> Tensor:
        """Take in a batch of inputs (..., I); return them (M, I) as they count."""
        rows_MI = inputs.reshape(-1, inputs.shape[-1]).float()
        if self._weight_OI is not None:
            output_MO = nn.functional.linear(inputs, self._weight_OI.to(inputs)).flatten(0, -2)
            size_M1 = output_MO.float().square().mean(-1, keepdim=True).sqrt()
            rows_MI = rows_MI / size_M1.clamp(min=LEAST)
        size, sum_II = self._size, self._sum()

        def multiply() -> None:
            for start in range(0, size, PANEL):
                panel_MP = rows_MI[:, start : start + PANEL]
                sum_II[start:, start : start + PANEL] += rows_MI[:, start:].T @ panel_MP

        once(multiply, rows_MI, *rows_MI.shape)
        return rows_MI

    def whole(self, team: Team) -> Tensor:
        """Return both triangles of the sum over all processes, in fp32, and let go of the sum."""
        sum_II = self._sum()
        self._sum_II = None
        starts = range(0, self._size, PANEL)
        team.add_up(sum_II[start:, start : start + PANEL] for start in starts)
        whole_II = torch.empty_like(sum_II, dtype=torch.float32)

        def mirror() -> None:
            for start in starts:
                panel = slice(start, start + PANEL)
                whole_II[start:, panel] = sum_II[start:, panel]
                whole_II[panel, start:] = sum_II[start:, panel].T

        once(mirror, sum_II, self._size)
        return whole_II

    def _sum(self) -> Tensor:
        if self._sum_II is None:
            dtype = sum_dtype(self._device)
            self._sum_II = torch.zeros(self._size, self._size, dtype=dtype, device=self._device)
        return self._sum_II


def product(values_MD: Tensor, inputs_MI: Tensor) -> Tensor:
    """Return values^T inputs (D, I) of a batch, in fp32.

    Of inputs in bf16 it is computed in bf16, twice as fast. That rounds an entry by 0.4 %, which a
    covariance of few tokens would not stand: it may then have no inverse.
    """
    dtype = torch.bfloat16 if inputs_MI.dtype == torch.bfloat16 else torch.float32
    return (values_MD.to(dtype).T @ inputs_MI.to(dtype)).float()


class Block:
    """A block of a layer, which can go on from what its last projection reads of each batch.

    Args:
        module: the block, None if it is no module of its own: then nothing is kept.
        projection: its last one. Nor is anything kept if the block changes that projection's
            output, such as by a factor.
        products: sums up what that reads.
        most: bytes of a batch's inputs that are kept; larger inputs are not.
        other: another model's values for each batch, used in place of those given to `on_read`.
    """

    def __init__(
        self,
        module: nn.Module | None,
        projection: nn.Module,
        products: Covariance,
        most: int,
        other: Read,
    ) -> None:
        self.module, self._projection, self._most = module, projection, most
        self.products = products
        self.missing_DI: Tensor | None = None
        self.inputs: list[Tensor] = []
        self._other, self._lack_MD = iter(other), torch.empty(0)
        self._written: Any = None
        self._output: Any = None

    def on_read(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Record the next batch's input of the block; runs before `on_input`."""
        self._lack_MD = (next(self._other).float() - args[0].float()).flatten(0, -2)

    def on_input(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Record the next batch's input of the projection; end the pass if that is all."""
        rows_MI = self.products.add(args[0])
        if len(self._lack_MD):
            found_DI = product(self._lack_MD, rows_MI.to(args[0].dtype))
            if self.missing_DI is None:
                dtype = sum_dtype(found_DI.device)
                self.missing_DI = torch.zeros_like(found_DI, dtype=dtype)
            self.missing_DI += found_DI
        keeps = self.module is not None and args[0].nbytes <= self._most
        if keeps:
            self.inputs.append(args[0])
        if not keeps or self._output is not None:
            raise Stop

    def on_written(self, _: nn.Module, __: Any, output: Any) -> None:
        """Note what the projection gives."""
        self._written = output

    def on_output(self, _: nn.Module, __: Any, output: Any) -> None:
        """Record whether the block returns its projection's output as it is."""
        if hidden_of(output) is not self._written:
            self.module = None
            self.inputs.clear()
        self._written, self._output = None, output
        raise Stop

    def forward(self, batch: int, *_: Any, **__: Any) -> Any:
        """Compute the block's output from the kept inputs of a batch."""
        written = self._projection(self.inputs[batch])
        return (written, *self._output[1:]) if isinstance(self._output, tuple) else written
