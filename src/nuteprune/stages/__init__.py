"""The recipe, a module for each stage: write, score, choose, refit, slice, judge, save.

Score, choose and refit work on a dense model that can be cut, `Prunable`, and leave it as they
found it. Slice uses a dense model up. The stage between, teach, is `train.trainer`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nuteprune.gates.allocate import Allocator
from nuteprune.gates.masks import Layout
from nuteprune.gates.surgeon import INPUTS
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.model.weights import is_packed
from nuteprune.processes import ALONE, Team, everyone
from nuteprune.simulated import has_data


@dataclass(frozen=True)
class Prunable:
    """A dense model with its hooks.

    Args:
        anatomy: its parts; LoRA is on its projections, and adds nothing.
        hooks: where masks multiply in it.
        bank: LoRA beside its weights, and weights in place of them.
        allocator: which shapes it can be cut to.
        is_sharded: whether its weights are shared out over processes.
    """

    anatomy: Anatomy
    hooks: MaskHooks
    bank: LoraBank
    allocator: Allocator
    is_sharded: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of gates in use."""
        return self.allocator.constraints.kinds

    @property
    def layout(self) -> Layout:
        """Its units."""
        return self.allocator.layout

    @property
    def device(self) -> torch.device:
        """Where its embedding is."""
        device: torch.device = self.anatomy.embedding.weight.device
        return device

    @property
    def team(self) -> Team:
        """The processes that share the work of its stages."""
        return everyone() if has_data(self.anatomy.embedding.weight) else ALONE

    def team_over(self, passes: int) -> Team:
        """Return the processes that share passes out; of a sharded model each needs as many."""
        return ALONE if self.is_sharded and passes % self.team.size else self.team

    @property
    def is_packed(self) -> bool:
        """Whether its weights are in 8 or 4 bits, so that none can stand in their place."""
        return is_packed(self.anatomy.model)

    @property
    def has_whole_weights(self) -> bool:
        """Whether this process holds its weights as they are: neither packed nor sharded."""
        return not (self.is_sharded or self.is_packed)

    @property
    def can_try_cuts(self) -> bool:
        """Whether cuts can be tried: whole weights are refitted to all that the gates remove."""
        return not self.is_packed and set(self.kinds) <= set(INPUTS)
