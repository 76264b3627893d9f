"""A run's phases on weights without data: what they hold and what they multiply, without doing it.

The code is a run's own: text, masks and allocation are real, weights and activations are not. What
asks for data is left out; what that holds is added by formula where it is not small.

Shape suffixes: B batch, T tokens, V vocabulary, N units of one kind in the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nuteprune.data.blocks import JUDGED
from nuteprune.distill.losses import Head
from nuteprune.distill.teachers import DENSE, Role
from nuteprune.export.checkpoint import rounded_as_stored
from nuteprune.gates.cutting import AT_ONCE, losses_of, run_dense
from nuteprune.gates.masks import Masks
from nuteprune.gates.probe import Probe
from nuteprune.gates.surgeon import INPUTS, input_slopes, removal_scores
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Projection
from nuteprune.shrink.compensate import Fit, install_in_place, lost_inputs, refit
from nuteprune.shrink.finalize import merge_layer
from nuteprune.shrink.slicing import Tensors, cut_state
from nuteprune.simulated import Live, without_data
from nuteprune.train.calibration import PLAIN_BATCH, frozen_parameters
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.extrapolate import Need
from nuteprune.train.prepare import Prepared, prepare
from nuteprune.train.simulate_experts import pricing, refitting, thin_experts


class Simulation:
    """A run that is made ready on a model without data.

    Args:
        config: of the dense model.
        args: the run's settings.
        length: tokens per block.
        dtype: what is computed in.
        model: with data, to measure what else is told; None: one without is made of the config.
        kind: the model's class; None: the stock one of the config.
        stored: dtype of the checkpoint, if the run is on a CPU. What is mapped from files is not
            counted then. None: a device, which holds all.
        masks: those that are learned; None: by chance, at the last target.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        args: NutePruneConfig,
        length: int,
        dtype: torch.dtype,
        model: PreTrainedModel | None = None,
        kind: type[PreTrainedModel] | None = None,
        stored: torch.dtype | None = None,
        masks: Masks | None = None,
    ) -> None:
        self.args, self._length = args, length
        self._dtype, self._stored = dtype, stored
        if model is None:
            with torch.device("meta"):
                model = model_of(config, dtype, kind)
        self.ready: Prepared = prepare(model, args)
        self.ready.coforward.bank.folder = None  # no data, so nothing to write
        self._mode = without_data(self.ready.model)
        if args.gradient_checkpointing:
            recompute(model, args.gradient_checkpointing_kwargs)
        self._masks = masks or self.ready.allocator.chance(self.ready.targets[-1])

    @contextmanager
    def _counting(self) -> Iterator[Live]:
        with Live() as live:
            self._count_model(live)
            yield live

    def _count_model(self, live: Live) -> None:
        model, copied = self.ready.model, self._stored != self._dtype
        for parameter in model.parameters():
            live.count(parameter)
            if not (copied or parameter.requires_grad):
                self._file(live, parameter)
        for buffer in model.buffers():
            live.count(buffer)
        live.peak = live.now

    def _file(self, live: Live, tensor: Tensor) -> None:
        """Put a tensor into a file, if the run does that: on a CPU."""
        if self._stored is not None:
            live.leave(tensor)

    def _text(self, blocks: int, size: int) -> list[Tensor]:
        return list(torch.zeros(blocks, self._length, dtype=torch.long).split(size))

    def judging(self) -> Need:
        """Judge the dense model by a batch of held-out text."""
        (ids_BT,) = self._text(JUDGED, JUDGED)
        with self._counting() as live:
            self._forward(ids_BT)
        return Need.of(live)

    @torch.no_grad()
    def _forward(self, ids_BT: Tensor) -> None:
        logits_BTV = self.ready.anatomy.model(input_ids=ids_BT, use_cache=False).logits
        F.cross_entropy(logits_BTV[0, :-1].float(), ids_BT[0, 1:])

    def sloping(self) -> Need:
        """Take the gradients of scoring, on a block of text; methods that only read hold less."""
        with self._counting() as live, frozen_parameters(self.ready.model):
            input_slopes(self._probe(0))
        return Need.of(live)

    def scoring(self, batches: int) -> Need:
        """Score the units on batches of the text that needs no gradients, layer by layer.

        Units are not cut one by one.
        """
        probe, experts = self._probe(batches), Need(0, 0)
        with frozen_parameters(self.ready.model):
            slopes = input_slopes(probe)
            with self._counting() as live:
                removal_scores(probe, slopes)
                if "expert_neurons" in self.ready.allocator.constraints.kinds:
                    experts = pricing(self.ready.anatomy, live)
        return Need.of(live) + experts

    def _probe(self, batches: int) -> Probe:
        ready, text = self.ready, self._text(batches * PLAIN_BATCH, PLAIN_BATCH)
        kinds = tuple(k for k in ready.allocator.constraints.kinds if k in INPUTS)
        block = self._text(1, 1)
        return Probe(ready.anatomy, ready.hooks, ready.allocator.budget, kinds, block, text)

    def copying(self) -> Need:
        """Run the dense model on what repeats, and cut the first units; work is the former's."""
        ready, layout = self.ready, self.ready.allocator.layout
        probe = Probe(ready.anatomy, ready.hooks, ready.allocator.budget, ())
        with self._counting() as live:
            dense = run_dense(probe)
            flops, fine = live.flops, live.fine
            for kind in {"heads", "kv_groups"} & set(ready.allocator.constraints.kinds):
                sizes = layout.sizes[kind]
                layer = next(i for i, size in enumerate(sizes) if size)
                losses_of(probe, kind, layer, torch.arange(min(AT_ONCE, sizes[layer])), dense)
        return replace(Need.of(live), flops=flops, fine=fine)

    def refitting(self, batches: int) -> Need:
        """Re-fit the projections, of all layers and at their most; the re-fitted weights stay."""
        ready, size = self.ready, self.args.per_device_train_batch_size
        bank = ready.coforward.bank
        put = install_in_place(bank, ready.anatomy)
        with self._counting() as live:

            def install(layer: int, projection: Projection, fit: Fit) -> None:
                put(layer, projection, fit)
                linear = ready.anatomy.linear(layer, projection)
                assert linear is not None
                self._file(live, linear.weight)

            text = self._text(batches * size, size)
            refit(ready.anatomy, ready.hooks, self._widest(), text, install, dense=bank.as_dense)
            experts = refitting(ready.anatomy, self._masks, live)
            self._stand_in_stacks(live)
        return Need.of(live) + experts

    @torch.no_grad()
    def _stand_in_stacks(self, live: Live) -> None:
        """Put stacks in place of those that a re-fit of experts replaces."""
        for i, mixture in thin_experts(self.ready.anatomy, self._masks):
            stack = torch.empty_like(mixture.stack(mixture.down))
            self.ready.coforward.bank.set_weight(i, mixture.down, stack)
            self._file(live, mixture.stack(mixture.down))

    def _widest(self) -> Masks:
        """Return masks that close a single unit of each kind in each layer.

        The widest layer decides what a re-fit holds, and each may be the one that keeps most.
        """
        layout, values = self._masks.layout, {}
        for kind in self._masks.values:
            parts = [torch.ones(size) for size in layout.sizes[kind]]
            if kind in INPUTS:
                for part in parts:
                    part[-1:] = 0
            values[kind] = torch.cat(parts)
        return Masks(layout, values)

    def step(self, moving: bool = False, snapshot: bool = False) -> Need:
        """Do two optimizer steps, the second of which has all that a step finds.

        Args:
            moving: whether masks are not fixed yet.
            snapshot: whether the teacher is an earlier snapshot, not the dense model.
        """
        ready = self.ready
        size = self.args.per_device_train_batch_size
        inputs = {"input_ids": torch.zeros(size, self._length, dtype=torch.long)}
        lora = [p for n, p in ready.model.named_parameters() if "lora_" in n]
        optimizer = torch.optim.AdamW(lora)
        ready.model.train()
        teacher, masks = DENSE, self._masks
        if moving:
            masks = self._moving(size)
        if snapshot:
            held = {k: torch.empty_like(v) for k, v in ready.coforward.bank.state().items()}
            teacher = Role(self._masks, held)
        flops = fine = 0
        with self._counting() as live:
            if self.args.compensation and not moving:
                self._stand_in(live)
            for _ in range(2):
                flops, fine = live.flops, live.fine
                self._micro_batch(masks, teacher, inputs)
                optimizer.step()
                ready.model.zero_grad()
        ready.model.eval()
        return replace(Need.of(live), flops=live.flops - flops, fine=live.fine - fine)

    @torch.no_grad()
    def _stand_in(self, live: Live) -> None:
        """Put weights in place of those that a re-fit replaces."""
        self._stand_in_stacks(live)
        anatomy, bank = self.ready.anatomy, self.ready.coforward.bank
        for i in range(len(anatomy.layers)):
            for _, projection, _ in lost_inputs(anatomy, self._masks, i):
                linear = anatomy.linear(i, projection)
                assert linear is not None
                bank.set_weight(i, projection, torch.empty_like(linear.weight))
                self._file(live, linear.weight)

    def _micro_batch(self, masks: Masks, teacher: Role, inputs: dict[str, Tensor]) -> None:
        ready = self.ready
        with ready.coforward.student(masks):
            taught = None if ready.plan.kind == "none" else teacher
            passage = ready.coforward.run(ready.model, inputs, taught)
            parts = ready.objective.parts(passage, Head.of(ready.anatomy), inputs)
            del passage
            torch.stack(list(parts.values())).sum().backward()

    def _moving(self, size: int) -> Masks:
        """Return masks whose gradients are wanted, one for each sequence."""
        layout = self._masks.layout
        values = {}
        for kind in self._masks.values:
            open_BN = torch.ones(size, layout.units(kind), requires_grad=True)
            values[kind] = open_BN if self._mode is None else self._mode.from_tensor(open_BN)
        return Masks(layout, values)

    def finalizing(self) -> Need:
        """Merge, fold and slice; uses the model up."""
        ready = self.ready
        bank, computed = ready.coforward.bank, ready.origin.computed_dtype
        with self._counting() as live:
            ready.hooks.remove()
            if self.args.compensation:
                self._stand_in(live)
            learned = bank.learned(bank.state())
            bank.release()
            anatomy = Anatomy(ready.model.unload())

            def begin(layer: int | None) -> None:
                if layer is not None:
                    merge_layer(anatomy, layer, learned, computed)

            def hold(part: Tensors) -> Tensors:
                part = rounded_as_stored(part, self._stored or computed)
                for tensor in part.values():
                    self._file(live, tensor)
                return part

            cut_state(anatomy, self._masks, begin, hold)
        return Need.of(live)


def recompute(model: PreTrainedModel, how: Any) -> None:
    """Let a model compute activations again instead of keeping them, as `Trainer` would.

    Args:
        model: the model.
        how: `gradient_checkpointing_kwargs` of the run's settings.
    """
    # Its newer name; releases that do not know it yet have the older one alone.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)(how)


def model_of(
    config: PreTrainedConfig, dtype: torch.dtype, kind: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """Return a model of a config, of the stock class or another, on the device of the moment."""
    make = AutoModelForCausalLM.from_config if kind is None else kind._from_config
    model: PreTrainedModel = make(config, dtype=dtype)
    model.eval()
    return model
