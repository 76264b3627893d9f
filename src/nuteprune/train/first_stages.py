"""The stages before the first step, with a run's settings and text: each leaves its product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nuteprune.console import Progress
from nuteprune.data.training_text import collated
from nuteprune.errors import UserError
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

LOOKED_AT = 32
"""Items of the text that are looked at before a run."""


class FirstStages:
    """Scores units, chooses those to remove, and refits the other weights.

    Args:
        model: the dense model.
        args: the run's settings.
        text: the training text, whose end is the calibration text.
        products: what the stages leave.
        progress: called with the progress of each stage.
        folder_of: where products of a target are; None: with the others.
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
        self._progress = progress

    def score(self) -> Scores:
        """Return the score of each unit."""
        args, model = self.args, self.model
        blocks_NT = self._blocks_NT[: args.scored_blocks]
        rounds = args.tried and model.can_try_cuts
        target = model.targets[-1].sparsity

        return self.products.keep(
            "score",
            lambda: score(
                model,
                blocks_NT,
                method=args.method,
                target=target,
                refit_blocks=self._refit_NT if rounds else None,
                seed=args.seed,
                progress=self._progress,
            ),
            method=args.method,
            gates=model.kinds,
            seed=args.seed,
            target=target if rounds or METHODS[args.method].cuts else None,
        )

    def choose(self, scores: Scores, target: Target) -> Masks:
        """Return which units stay at a target."""
        model = self.model
        values = self.products.keep(
            "choose",
            lambda: choose(model, scores, target.goal).to("cpu").values,
            folder=self._folder_of(target),
            target=str(target.asked),
            sparsity=target.sparsity,
            shapes=self.args.shapes,
            neuron_multiple=self.args.neuron_multiple,
            hidden_multiple=self.args.hidden_multiple,
        )
        return Masks(model.layout, values).to(model.device)

    def refit(self, masks: Masks, target: Target) -> Weights | None:
        """Return the refitted weights; None without a refit."""
        if not self.args.refit:
            return None
        return self.products.keep(
            "refit",
            lambda: refit(
                self.model,
                masks,
                self._refit_NT,
                rank=self.args.lora_rank,
                progress=self._progress,
            ),
            folder=self._folder_of(target),
            everywhere=not self.model.is_sharded,
            rank=self.args.lora_rank,
        )


def check_text(dataset: Any, alike: bool = False) -> None:
    """Refuse a dataset that calibration cannot read by index.

    Args:
        dataset: the text.
        alike: whether its items must have one length; the first ones are checked.

    Raises:
        UserError: naming what is missing.
    """
    if dataset is None:
        raise UserError("there is no training text: pass train_dataset")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"train_dataset is a {type(dataset).__name__}, which can only be read in order, and "
            "calibration reads its end: pass a list of its first items, such as "
            "list(itertools.islice(dataset, args.blocks))"
        )
    if not len(dataset):
        raise UserError("train_dataset is empty: pass at least one item with input_ids")
    if "input_ids" not in (item := dataset[0]):
        raise UserError(
            f"items of train_dataset have {', '.join(map(str, item))} and no input_ids: pass "
            "tokenized text"
        )
    if alike:
        collated([dataset[i] for i in range(min(LOOKED_AT, len(dataset)))])


def calibration_blocks(dataset: Any, count: int) -> Tensor:
    """Return token ids (N, T) of blocks from the end of the training text, the last one first.

    Padding is left out, and the tokens after it move up.

    Args:
        dataset: items with `input_ids` (T,) and, where there is padding, `attention_mask` (T,);
            blocks are as long as the longest of the last `count`.
        count: blocks wanted; a short dataset gives some of them twice.

    Raises:
        UserError: if there is no text, or nothing but padding.
    """
    check_text(dataset)
    size = len(dataset)
    order = range(size - 1, -1, -1)
    length = max((len(dataset[i]["input_ids"]) for i in order[:count]), default=0)
    parts: list[Tensor] = []
    missing, read = count * length, 0
    while missing > 0:
        if read == size and not any(map(len, parts)):
            raise UserError("the training text is nothing but padding: check its attention_mask")
        item = dataset[order[read % size]]
        ids = torch.as_tensor(item["input_ids"])
        if "attention_mask" in item:
            ids = ids[torch.as_tensor(item["attention_mask"]).bool()]
        parts.append(ids)
        missing, read = missing - len(ids), read + 1
    if not count:
        return torch.empty(0, length, dtype=torch.long)
    return torch.cat(parts)[: count * length].view(count, length)
