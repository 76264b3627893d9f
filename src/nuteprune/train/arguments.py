"""What the settings of all runs have in common, as `transformers.Trainer` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import TrainingArguments

from nuteprune.train.checks import check_trainer_settings
from nuteprune.train.settings import check_declared


class RunArguments(TrainingArguments):
    """The base of the dataclasses that declare a run's settings; see `train.settings`."""

    lora_rank: int

    FOLLOWING: ClassVar[Mapping[str, Any]] = {}
    """Settings that are left open -> what follows from the others: on no record."""

    def __post_init__(self) -> None:
        """Check what was given.

        Raises:
            UserError: naming a setting that cannot work.
        """
        if isinstance(self.report_to, str):
            self.report_to = [name.strip() for name in self.report_to.split(",")]
        super().__post_init__()
        check_trainer_settings(self)
        check_declared(self)

    @property
    def staged(self) -> bool:
        """Whether what a step is to do depends on how many steps there are in all."""
        return False

    @property
    def sequences_per_step(self) -> int:
        """How many sequences all processes together learn from in a step."""
        return int(self.train_batch_size * self.gradient_accumulation_steps * self.world_size)
