"""The stages before the first step, with a run's settings and text: each leaves its product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nuteprune.console import Progress
from nuteprune.data.training_text import calibration_blocks
from nuteprune.gates.importance import METHODS
from nuteprune.gates.masks import Masks
from nuteprune.gates.scores import Scores
from nuteprune.model.lora import Weights
from nuteprune.products import Products, digest
from nuteprune.stages.choose import choose
from nuteprune.stages.refit import refit
from nuteprune.stages.score import score
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.prepare import Prepared
from nuteprune.train.targets import Target


class Cut:
    """Chooses the units to remove, and refits the other weights.

    Args:
        model: the dense model.
        args: the run's settings.
        text: the training text, whose ends are the calibration text.
        products: what the stages leave.
        progress: called with the progress of each stage.
        folder_of: where products of a goal are; None: with the others.
    """

    def __init__(
        self,
        model: Prepared,
        args: NutePruneConfig,
        text: Any,
        products: Products,
        progress: Progress,
        folder_of: Callable[[Target], Path | None] = lambda _: None,
    ) -> None:
        self.model, self.args, self.products, self._folder_of = model, args, products, folder_of
        self._blocks_NT = calibration_blocks(text, args.calibrated_blocks)
        products.depends("text", calibration=digest({"blocks": self._blocks_NT}))
        self._refit_NT = self._blocks_NT[: args.refit_blocks]
        self._how: dict[str, Any] = {
            "batch_size": args.per_device_train_batch_size,
            "progress": progress,
        }

    def score(self) -> Scores:
        """Return the score of each unit."""
        args, model = self.args, self.model
        blocks_NT = self._blocks_NT[: args.scored_blocks]
        rounds = args.tried and model.can_try_cuts
        target = model.goals[-1].sparsity

        return self.products.keep(
            "score",
            lambda: score(
                model,
                blocks_NT,
                method=args.method,
                target=target,
                refit_blocks=self._refit_NT if rounds else None,
                seed=args.seed,
                **self._how,
            ),
            method=args.method,
            gates=model.kinds,
            seed=args.seed,
            target=target if rounds or METHODS[args.method].cuts else None,
        )

    def choose(self, scores: Scores, goal: Target) -> Masks:
        """Return which units stay at a target."""
        model = self.model
        values = self.products.keep(
            "choose",
            lambda: choose(model, scores, goal.goal).to("cpu").values,
            folder=self._folder_of(goal),
            target=str(goal.asked),
            sparsity=goal.sparsity,
            shapes=self.args.shapes,
            neuron_multiple=self.args.neuron_multiple,
            hidden_multiple=self.args.hidden_multiple,
        )
        return Masks(model.layout, values).to(model.device)

    def refit(self, masks: Masks, goal: Target) -> Weights | None:
        """Return the refitted weights; None without a refit."""
        if not self.args.refit:
            return None
        return self.products.keep(
            "refit",
            lambda: refit(self.model, masks, self._refit_NT, rank=self.args.lora_rank, **self._how),
            folder=self._folder_of(goal),
            everywhere=not self.model.is_sharded,
            batch_size=self.args.per_device_train_batch_size,
            rank=self.args.lora_rank,
        )
