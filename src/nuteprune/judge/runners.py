"""Loaded models that a worker times, one class for each engine.

Shape suffixes: B sequences, T tokens of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import transformers
from transformers import PreTrainedModel

from nuteprune.judge.bench import Timing, hardware_of, time_once
from nuteprune.judge.work import Work, Workload
from nuteprune.model.anatomy import Anatomy


@dataclass(frozen=True)
class About:
    """Facts of a model and of the program that runs it.

    Args:
        work: what it has to move and multiply.
        positions: tokens of a sequence that it can take; None: any.
        engine: name and version.
        attention: the kind that the engine uses.
        threads: of a CPU.
        hardware: the accelerator's name, or `CPU`.
    """

    work: Work
    positions: int | None
    engine: str
    attention: str
    threads: int
    hardware: str


class Runner(Protocol):
    """A loaded model that can be timed."""

    def about(self) -> About:
        """Describe the model and the program that runs it."""

    def time(self, setting: Workload) -> Timing:
        """Time one pass of random tokens."""


class TorchRunner:
    """A model in plain transformers.

    Args:
        model: a causal LM, on its device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def about(self) -> About:
        """Describe the model and the program that runs it."""
        model = self._model
        return About(
            Work.of(model),
            getattr(model.config, "max_position_embeddings", None),
            f"transformers {transformers.__version__}",
            str(model.config._attn_implementation),
            torch.get_num_threads(),
            hardware_of(model.device),
        )

    def time(self, setting: Workload) -> Timing:
        """Time one pass of random tokens."""
        random = torch.Generator().manual_seed(0)
        size = (setting.batch_size, setting.length)
        vocabulary = int(Anatomy(self._model).embedding.weight.shape[0])
        prompt_BT = torch.randint(vocabulary, size, generator=random).to(self._model.device)
        return time_once(self._model, prompt_BT, setting.new_tokens)
