"""Settings of a `ProgressiveTrainer`: ours, and all of `transformers.TrainingArguments`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from transformers.training_args import OptimizerNames

from nuteprune.distill.coforward import RELATIVE, Objective
from nuteprune.errors import UserError
from nuteprune.gates import METHOD
from nuteprune.progressive.gates import HardConcreteGates, RankedGates
from nuteprune.progressive.settings import ProgressiveSettings
from nuteprune.progressive.teachers import Schedule
from nuteprune.train.config import NutePruneConfig

GATE_TYPES: Mapping[str, type[RankedGates | HardConcreteGates]] = {
    "ranked": RankedGates,
    "hard_concrete": HardConcreteGates,
}
"""Name, as the setting `gate_type` has it, -> the type of gates."""
PAPER = Objective(token_weight=0.1, layer_weight=0.9, as_published=True, temperature=2 / 3)
"""The published loss: the sum over layers of plain squared errors, the sum over tokens of the KL
divergence, and no language-model loss; the last layer's outputs behind the final norm, as in the
authors' code."""
OBJECTIVES = {"relative": RELATIVE, "paper": PAPER}
"""Name, as the setting `objective` has it, -> the terms where a teacher takes part."""
ASCENDING = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Values of `optim` that know `maximize`."""


@dataclass
class ProgressiveConfig(ProgressiveSettings, NutePruneConfig):  # type: ignore[misc]
    """Settings of a run whose masks move while the student learns.

    Args:
        gate_type: `ranked` (hard masks by the scores, which are re-estimated from gradients) or
            `hard_concrete` (the paper's stochastic gates, driven by its Lagrangian).
        ramp_share: share of the steps by which the target is reached; masks are frozen there.
        freeze_share: share of the steps by which masks are frozen, if later than the ramp's end.
        teacher: `snapshots` (those that the ramp leaves on its way), `dense`, or `none`.
        objective: `relative` (token KL, and layer terms relative to the teacher's norm) or `paper`.
        lora_targets: `all` projections or `qv` (queries and values, the paper's).

    Raises:
        UserError: for settings that do not go together.
    """

    PIPELINE: ClassVar[str] = "nuteprune.progressive.trainer"

    def __post_init__(self) -> None:
        self.progressive = True
        super().__post_init__()
        gate_type, optimizer = GATE_TYPES[self.gate_type], OptimizerNames(self.optim).value
        if not (self.ramp_share or self.freeze_share):
            raise UserError(
                "masks that move need steps to move in: pass ramp_share or freeze_share above 0, "
                "or leave progressive out"
            )
        if gate_type.trained and not self.max_steps:
            raise UserError(f"{self.gate_type} learns its masks in steps: pass max_steps above 0")
        if not gate_type.ranked and self.method != METHOD:
            raise UserError(
                f"gate_type {self.gate_type} starts all units alike, so method {self.method} has "
                "nothing to rank: leave one of the two out"
            )
        if self.has_narrow_lora and self.refit:
            raise UserError(
                "lora_targets qv leaves no LoRA beside the weights that the refit puts in place: "
                "set refit to false"
            )
        if gate_type.trained and optimizer not in ASCENDING:
            raise UserError(
                f"the Lagrangian's multipliers ascend, which {optimizer} cannot do: leave optim out"
            )

    def schedule(self, target: float) -> Schedule:
        """Return when masks move and freeze, and who teaches, on the way to a sparsity."""
        freeze = self.ramp_share if self.freeze_share is None else self.freeze_share
        teach = self.teacher == "snapshots"
        return Schedule(target, self.max_steps, self.ramp_share, freeze, teach)

    @property
    def has_unused_parameters(self) -> bool:
        """Whether parameters that are trained may have no gradients: gates that are frozen."""
        return GATE_TYPES[self.gate_type].trained

    @property
    def losses(self) -> Objective:
        """What the student is trained on."""
        return super().losses if self.teacher == "none" else OBJECTIVES[self.objective]

    @property
    def has_narrow_lora(self) -> bool:
        """Whether LoRA is on queries and values alone."""
        return self.lora_targets == "qv"

    @property
    def scored_blocks(self) -> int:
        """Blocks that the one-shot scores read, those without gradients among them."""
        return super().scored_blocks if GATE_TYPES[self.gate_type].ranked else 0
