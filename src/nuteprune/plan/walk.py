"""A run's stages on a model without data: what each holds and multiplies, without doing it.

The code is the stages' own: text, masks and scores are real, weights and activations are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from nuteprune.data.training_text import JUDGED
from nuteprune.errors import UserError
from nuteprune.export.loading import UNREADABLE, class_of
from nuteprune.gates.masks import Masks
from nuteprune.gates.surgeon import READ
from nuteprune.judge.perplexity import perplexities
from nuteprune.model.lora import Weights
from nuteprune.plan.live import Live, without_data
from nuteprune.plan.need import Need
from nuteprune.plan.trial import trial_step
from nuteprune.simulated import gather, let_go
from nuteprune.stages.refit import refit
from nuteprune.stages.score import score
from nuteprune.stages.slice import slice_model
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.distiller import BadSteps
from nuteprune.train.prepare import Prepared, prepare
from nuteprune.train.trainer import NutePruneTrainer


class Walk:
    """A model without data, prepared for a run; it is good for a stage, or several.

    Args:
        config: of the dense model.
        args: the run's settings.
        length: tokens per block.
        dtype: the one to compute in.
        model: one with data, to measure in place of planning; None: one without, from the config.
        stored: dtype of the checkpoint, if the run is on a CPU. What is mapped from files is not
            counted then. None: a device, which holds all.
        masks: the cut; None: by chance, at the last target.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        args: NutePruneConfig,
        length: int,
        dtype: torch.dtype,
        model: PreTrainedModel | None = None,
        stored: torch.dtype | None = None,
        masks: Masks | None = None,
    ) -> None:
        self._config, self._args, self._length, self._stored = config, args, length, stored
        if model is None:
            with torch.device("meta"):
                model = model_of(config, dtype)
        self._model: Prepared = prepare(model, args, stored)
        self._folder = Path(str(args.output_dir)) if stored is not None else None
        self._model.bank.folder = self._folder
        without_data(self._model.model)
        self._masks = masks or self._model.allocator.chance(self._model.targets[-1].sparsity)

    @contextmanager
    def _counting(self) -> Iterator[Live]:
        model, live = self._model.model, Live()
        mapped = self._stored == self._model.origin.computed_dtype
        with live:
            for tensor in (*model.parameters(), *model.buffers()):
                live.count(tensor)
            for parameter in model.parameters() if mapped else ():
                if not parameter.requires_grad:
                    live.leave(parameter)
            live.peak = live.now
            with ExitStack() as stack:
                for layer in self._model.anatomy.layers:
                    stack.enter_context(layer.register_forward_pre_hook(_begin))
                    stack.enter_context(layer.register_forward_hook(_end, always_call=True))
                yield live

    def _text(self, blocks: int) -> Tensor:
        return torch.zeros(blocks, self._length, dtype=torch.long)

    def judge(self) -> Need:
        """Judge the dense model by a batch of held-out text."""
        with self._counting() as live:
            perplexities(self._model.anatomy.model, {"": self._text(JUDGED)}, batch_size=JUDGED)
        return Need.of(live)

    def score(self, blocks: int, gradients: int) -> Need:
        """Score the units once on so much text: gradients, then layer by layer, in stretches."""
        method = self._args.method
        with self._counting() as live:
            text, told = self._text(blocks), live.progress
            score(self._model, text, method=method, gradients=gradients, progress=told)
            live.progress()
        # The first time it tells that it begins; the rest of the last stretch is of the one before.
        began, *ticks, rest = live.ticks
        ticks[-1:] = [max(*ticks[-1:], rest)] if ticks else [rest]
        layers = len(self._model.anatomy.layers)
        stretches = [ticks[:gradients]]
        stretches += [ticks[i : i + layers] for i in range(gradients, len(ticks), layers)]
        return Need.of(live, [max([began, *x]) for x in stretches])

    def refit(self, blocks: int) -> Need:
        """Refit all layers at their worst case on this much text, and keep the fits."""
        with self._counting() as live:
            self._refit(self._widest(), blocks)
        return Need.of(live)

    def _refit(self, masks: Masks, blocks: int) -> Weights:
        return refit(self._model, masks, self._text(blocks), rank=self._args.lora_rank)

    def _widest(self) -> Masks:
        """Return masks that close a single unit of each kind in each layer.

        The widest layer decides the memory of a refit, and any layer may be the widest.
        """
        layout = self._masks.layout
        masks = Masks.open(layout, self._masks.values)
        for kind in READ.keys() & masks.values.keys():
            for part in masks.values[kind].split(layout.sizes[kind]):
                part[-1:] = 0
        return masks

    def teach(self, kind: str = "") -> Need:
        """Do an optimizer step; see `_taught`."""
        with self._taught(kind) as (live, _):
            return Need.of(live)

    @contextmanager
    def _taught(self, kind: str) -> Iterator[tuple[Live, NutePruneTrainer]]:
        """Do two optimizer steps, the second of which has all that a step finds.

        Args:
            kind: of the steps where masks move; see `progressive.plan`.
        """
        size = self._args.per_device_train_batch_size
        with self._counting() as live:
            weights = None
            if self._args.refit and kind in ("", "fixed"):
                weights = self._refit(self._masks, 1)
            if kind:
                progressive = import_module("nuteprune.progressive.plan")
                trainer = progressive.Planned(self._model, self._args, kind, self._masks)
            else:
                trainer = NutePruneTrainer(self._model, self._args, masks=self._masks)
            trainer.bad_steps = BadSteps(torch.device("cpu"))  # where all claim to be
            if weights is not None:
                self._model.bank.install(weights)
            del weights
            live.restart()
            for _ in range(2 if self._args.max_steps else 0):
                live.flops = live.fine = 0
                live.moved.clear()
                trial_step(trainer, {"input_ids": self._text(size)})
                trainer._clip_grad_norm(trainer.model)
                trainer.create_optimizer().step()
                trainer.model.zero_grad()
            yield live, trainer

    def slice(self) -> Need:
        """Merge, fold and cut the trained model, which is not kept."""
        model, origin = self._model, self._model.origin
        with self._taught("fixed" * self._args.progressive) as (live, trainer):
            live.restart()
            if trainer.optimizer is not None:
                trainer.optimizer.state.clear()
            learned = model.bank.learned()
            slice_model(
                self._reloaded(live) if model.must_be_reloaded else model.unwrapped(),
                self._masks,
                learned,
                computed_dtype=origin.computed_dtype,
                stored_dtype=origin.stored_dtype,
                folder=self._folder,
            )
        return Need.of(live)

    def _reloaded(self, live: Live) -> PreTrainedModel:
        """Return the dense model anew as it is stored, mapped from its file."""
        self._model.free()
        with torch.device("meta"):
            dense = model_of(self._config, self._model.origin.stored_dtype)
        without_data(dense)
        for parameter in dense.parameters():
            live.leave(parameter)
        return dense


def _begin(layer: nn.Module, _: Any) -> None:
    gather(layer, "passed", 1 + torch.is_grad_enabled())  # a backward pass gathers it again


def _end(*_: Any) -> None:
    let_go()


def model_of(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of a config, on the current device.

    Raises:
        UserError: if the class can make none.
    """
    kind: Any = class_of(config.model_type)
    try:
        model: PreTrainedModel = kind._from_config(config, dtype=dtype)
    except UNREADABLE as error:
        raise UserError(f"no model can be made of this config: {error!r:.300}") from error
    model.eval()
    return model
