"""Live views of a layer's routed experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from nuteprune.model.family import Experts, Projection


@dataclass(frozen=True)
class Mixture:
    """Live views of a layer's routed experts.

    Args:
        entry: their part of the family's entry.
        block: the module that routes tokens to experts and adds up their outputs.
        router: scores the experts; has a row of weights for each.
        experts: holds their stacked weights.
        per_token: how many experts a token is routed to.
    """

    entry: Experts
    block: nn.Module
    router: Any
    experts: Any
    per_token: int

    def stack(self, projection: Projection) -> nn.Parameter:
        """Return a projection's weights: (experts, rows, columns), or as the entry has them."""
        return cast(nn.Parameter, getattr(self.experts, projection.path.rpartition(".")[2]))

    def bias(self, projection: Projection) -> nn.Parameter | None:
        """Return a projection's biases (experts, rows), None if it has none."""
        return getattr(self.experts, f"{projection.path.rpartition('.')[2]}_bias", None)

    @property
    def down(self) -> Projection:
        """The projection from an expert's neurons to its output."""
        return self.entry.projections[-1]

    def plain(self, weight: Tensor) -> Tensor:
        """Return a view (rows, columns) of one expert's part of a stack."""
        return weight.T if self.entry.transposed else weight

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of experts, and of neurons of each."""
        down = self.stack(self.down)
        return int(down.shape[0]), int(down.shape[1 if self.entry.transposed else 2])
