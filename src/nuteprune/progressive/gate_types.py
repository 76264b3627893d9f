"""The types of gates that a run can have, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from nuteprune.gates.allocate import Allocator
from nuteprune.progressive.gates import Gates, RankedGates
from nuteprune.progressive.hard_concrete import HardConcreteGates


@dataclass(frozen=True)
class GateType:
    """A type of gates.

    Args:
        make: from an allocator and the units' scores, kind -> (N,), to gates.
        ranked: whether masks follow one-shot scores; else all units start alike.
        trained: whether the optimizer trains them: then they need steps to learn in, and an
            optimizer that can ascend for the Lagrangian's multipliers.
    """

    make: Callable[[Allocator, Mapping[str, Tensor]], Gates]
    ranked: bool
    trained: bool


GATE_TYPES = {
    "ranked": GateType(RankedGates, ranked=True, trained=False),
    "hard_concrete": GateType(HardConcreteGates, ranked=False, trained=True),
}
"""Name, as the setting `gate_type` has it, -> what it is."""
