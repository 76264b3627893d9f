"""A refit of a model without adapters, for tests that compare with one."""

from __future__ import annotations

from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Projection
from nuteprune.shrink.least_squares import Fit, Install


def install_weight(anatomy: Anatomy) -> Install:
    """Return an `Install` that overwrites the weights of a model without adapters."""

    def install(layer: int, projection: Projection, fit: Fit) -> None:
        linear = anatomy.linear(layer, projection)
        assert linear is not None
        linear.weight.copy_(fit.weight_OI.to(linear.weight.dtype))

    return install
