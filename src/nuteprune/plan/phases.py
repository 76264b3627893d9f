"""What each stage of a run takes, in memory and work, from a config alone: its phases in a plan."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from typing import Any

import torch
from transformers import PreTrainedConfig

from nuteprune.data.decoding import TEXT_TOKENS, plain_together
from nuteprune.data.training_text import JUDGED
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.masks import Masks
from nuteprune.gates.surgeon import INPUTS
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.layerwise import BATCH
from nuteprune.plan.need import (
    ONE_BY_ONE,
    PARTS_OF_LAYERS,
    SHORT,
    Need,
    Sizes,
    extended,
    in_batches,
    of_all_widths,
    shortened,
)
from nuteprune.plan.walk import Walk, model_of
from nuteprune.stages.score import stops_before, with_gradients
from nuteprune.stages.write import OWN_SHARE, tokens_to_write
from nuteprune.train.asked import SETTINGS
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.constraints import make_allocator
from nuteprune.train.own_answers import ANSWERS, EVERY, TOKENS, WITHOUT_TEACHER, own_steps
from nuteprune.train.targets import Prices, run_targets

SIMULATED, FORMULA = "simulated", "formula"
MOMENTS = 2
"""Memory that Adam keeps for a trained parameter, as a multiple of it."""
NOT_SHARED = ("slice", "save")
"""Phases that one process does whole, or each for itself; products of the others are shared out."""
FEW_BLOCKS = (6, 9)
"""Blocks that are scored in place of many: in more than one batch, with and without gradients."""
ON_CPUS = ("cut",)
"""Entries of `Plan.disk` that only runs on CPUs write."""


@dataclass(frozen=True)
class Phase:
    """The memory and work of a stage in a run.

    Args:
        name: the stage's.
        need: its peak in bytes, weights among them, and the work of all of it.
        how: `SIMULATED`, or by a `FORMULA` where code would ask for data.
        steps: optimizer steps in it.
        read: bytes of weights and of keys and values that are read where few tokens at a time are
            multiplied; elsewhere work takes longer.
    """

    name: str
    need: Need
    how: str = SIMULATED
    steps: int = 0
    read: float = 0


@dataclass(frozen=True)
class Plan:
    """A run to be planned.

    Args:
        config: of the dense model.
        args: the run's settings.
        length: tokens per block.
        dtype: the one to compute in.
        sizes: of the model's parts.
        allocator: which shapes it can be cut to.
        targets: the sparsities that it is to reach, growing.
        of_a_token: `active_before` and `active_after` at each target; empty where there are no
            experts.
        written: dtype of the files of a checkpoint.
        judged: blocks of held-out text; None: not known, and one batch is gone through.
        stored: dtype of the checkpoint, if the run is on a CPU. Peaks then leave out mapped
            files: weights are mapped, unless the run computes in another dtype. None: a
            device, which holds all.
        own: share of the text that the model writes itself.
        packed: whether weights are in few bits, so that cuts are not tried.
    """

    config: PreTrainedConfig
    args: NutePruneConfig
    length: int
    dtype: torch.dtype
    sizes: Sizes
    allocator: Allocator
    targets: tuple[float, ...]
    of_a_token: tuple[dict[str, int], ...]
    written: torch.dtype
    judged: int | None = None
    stored: torch.dtype | None = None
    own: float = OWN_SHARE
    packed: bool = False

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        args: NutePruneConfig,
        length: int,
        dtype: torch.dtype,
        **more: Any,
    ) -> Plan:
        """Look at the model of a config, without making its weights.

        Raises:
            UserError: for settings that this model cannot take.
        """
        written = more.get("stored") or getattr(config, "dtype", None)
        written = written if isinstance(written, torch.dtype) else dtype
        with torch.device("meta"):
            anatomy = Anatomy(model_of(config, dtype))
        allocator = make_allocator(anatomy, args)
        sizes = Sizes.of(anatomy, args, length, allocator.constraints.kinds)
        prices = Prices.of(anatomy, written, args)
        asked, scores = run_targets(allocator, args, prices), allocator.chance_scores()
        targets = tuple(x.sparsity for x in asked)
        each = (prices.of_a_token(allocator.shape(scores, x.goal)) for x in asked)
        found = tuple(x for x in each if x)
        return cls(config, args, length, dtype, sizes, allocator, targets, found, written, **more)

    # -- what is gone through

    def walked(
        self,
        stage: Callable[[Walk], Need],
        short: tuple[int, ...] = SHORT,
        masks: Masks | None = None,
    ) -> Need:
        """Run a stage without data."""

        def run(config: PreTrainedConfig) -> Need:
            args = self._by_share(config)
            walk = Walk(config, args, self.length, self.dtype, stored=self.stored, masks=masks)
            return stage(walk)

        if masks is not None:
            return run(shortened(self.config, len(masks.layout.shape.layers)))
        return extended(self.config, run, short, self.allocator.layout.shape.layers)

    def _by_share(self, config: PreTrainedConfig) -> NutePruneConfig:
        """Return the settings for a model of fewer layers, which is to lose the same share.

        Sizes, speeds, counts of layers and tables of costs are those of the whole model.
        """
        args, asked = copy.copy(self.args), self.args.asked[0].kind
        for name in SETTINGS:
            setattr(args, name, None)
        args.costs = None
        if asked == "speedup" or self.args.shape is not None:  # which may bring kinds of their own
            args.gates = ",".join(self.allocator.constraints.kinds)
        with torch.device("meta"):
            anatomy = Anatomy(model_of(config, self.dtype))
        args.target_sparsity = 0.0
        most = make_allocator(anatomy, args).maximum()
        if most < min(self.targets):  # as where the first layer has to keep its attention
            args.gates = None
            most = make_allocator(anatomy, args).maximum()
        args.target_sparsity = min(self.targets[0], most)
        return args

    def phases(self) -> list[Phase]:
        """Return all phases, in their order."""
        found = [*self._write(), self.judge(), *self.score(), *self._refit()]
        return [*found, *self.teach(), *self.cut()]

    # -- stages

    @property
    def _weights(self) -> float:
        """Bytes of the dense model that count."""
        return 0 if self.stored == self.dtype else self.sizes.weights

    @property
    def refitted(self) -> int:
        """Bytes of refitted weights beside the base's own, at most; CPUs map them."""
        return self.sizes.refitted if self.args.refit and self.stored is None else 0

    @property
    def stops(self) -> int:
        """How many times the remaining units are scored again."""
        kinds = set(self.allocator.constraints.kinds)
        again = self.args.tried and not self.packed and kinds <= INPUTS.keys()
        return len(stops_before(self.targets[-1])) if again else 0

    @property
    def results(self) -> list[float]:
        """Bytes of the model of each target, in the dtype of the run; the smallest last."""
        return [self.sizes.weights - x * self.sizes.projections for x in self.targets]

    @property
    def beside(self) -> list[float]:
        """Bytes of the models on a device beside the one that is judged; CPUs map the dense one."""
        if self.stored is not None:
            return []
        several = len(self.targets) > 1  # the run's own waits for the next target
        return [self.results[0], *[self.sizes.weights] * several]

    @cached_property
    def _judged(self) -> Need:
        return self.walked(Walk.judge)

    def _write(self) -> list[Phase]:
        read = (self.args.blocks, self.args.calibrated_blocks)
        blocks = tokens_to_write(*read, self.own, self.length) // self.length if self.own else 0
        if not blocks:
            return []
        # A token at a time, as if none were a chat: all weights are read at each position, and on
        # the average half of the keys and values.
        short, sizes = min(TEXT_TOKENS, self.length), self.sizes
        texts = math.ceil(blocks * self.length / short)
        together = plain_together(texts, sizes.together, self.length)
        positions = math.ceil(texts / together) * short
        held = self._weights + sizes.adapters + sizes.cached
        work = self._judged.flops / JUDGED * blocks
        need = Need((held,), work, moved={"gathered": positions * sizes.layers})
        return [Phase("write", need, FORMULA, read=positions * self._read(together, short))]

    def judge(self) -> Phase:
        """Return the phase of judging."""
        batches = (self.judged or JUDGED) / JUDGED
        if self.judged is not None:
            batches *= 1 + sum(self.results) / self.sizes.weights
        return Phase("judge", self._judged.held(sum(self.beside)).times(batches))

    def score(self) -> list[Phase]:
        """Return the phase of scoring, if there is one."""
        args = self.args
        if args.progressive and not args.scored_blocks:  # masks that are learned
            return []

        count = args.scored_blocks
        share = with_gradients(args.method, count) / max(1, count)

        def scored(blocks: int) -> Need:
            stage = partial(Walk.score, blocks=blocks, gradients=round(share * blocks))
            return self.walked(stage, PARTS_OF_LAYERS)

        need = in_batches(scored, count, FEW_BLOCKS)
        if stops := self.stops:
            need = need.times(1 + stops).held(self.refitted).then(self._refit_need.times(stops))
        return [Phase("score", need)]

    @cached_property
    def _refit_need(self) -> Need:
        """Need of a refit."""

        def refit(blocks: int) -> Need:
            return self.walked(partial(Walk.refit, blocks=blocks), ONE_BY_ONE)

        return in_batches(refit, self.args.refit_blocks, (2 * BATCH, 3 * BATCH))

    def _refit(self) -> list[Phase]:
        if not self.args.refit:
            return []
        between = self.args.progressive and "fixed" not in list(self._steps)[:1]
        need = self._refit_need.held(MOMENTS * self.sizes.adapters * between)
        return [Phase("refit", need.times(len(self.targets)))]

    @cached_property
    def _steps(self) -> dict[str, int]:
        """Kind of steps -> how many there are to a target."""
        if not self.args.progressive:
            return {"": self.args.max_steps} if self.args.max_steps else {}
        planned = import_module("nuteprune.progressive.plan")
        found: dict[str, int] = planned.kinds_of_steps(self.args, self.targets[-1])
        return found

    def teach(self) -> list[Phase]:
        """Return the phase of all steps, if there are any."""
        args, need = self.args, Need((0,))
        for kind, steps in self._steps.items():
            each = args.gradient_accumulation_steps * steps * len(self.targets)
            need = need.then(self.step(kind).times(each))
        steps, read = args.max_steps * len(self.targets), 0.0
        if args.reads_own_answers and steps:
            own, most = own_steps(args.max_steps), min(TOKENS, self.length)
            positions = math.ceil(own / EVERY) * most * len(self.targets)
            read = positions * self._read(ANSWERS, most)
            written = self._judged.flops / JUDGED / self.length * ANSWERS * positions
            reading = 1 + WITHOUT_TEACHER * own / args.max_steps
            moved = {"gathered": positions * self.sizes.layers}
            need = need.times(reading).then(Need((0,), written, moved=moved))
        need = need.then(Need((0,), moved={"summed": steps * self.sizes.adapters}))  # gradients
        return [Phase("teach", need, steps=steps, read=read)][: args.max_steps]

    def _read(self, texts: int, length: int) -> float:
        """Return the bytes that a token of each text reads: weights, half of keys and values."""
        cached = self.sizes.cached * length / self.length * texts / self.sizes.together
        return self.sizes.read + cached / 2

    def step(self, kind: str = "") -> Need:
        """Return the need of one micro-batch of a step of a kind."""
        step = partial(Walk.teach, kind=kind)
        need = self.walked(step)
        if self.stored is None or kind == "moving" or hasattr(self.config, "pruned"):
            return need
        # Layers of the same widths share kernels, so these do not grow layer by layer.
        masks = of_all_widths([self.allocator.chance(x) for x in self.targets])
        return replace(need, sizes=self.walked(step, masks=masks).sizes) if masks else need

    def cut(self) -> list[Phase]:
        """Return the phases after teaching."""
        # Few layers hold most when what is in none is cut. Many copied ones hold most before that.
        whole = self.config.num_hidden_layers
        copied = self.stored not in (None, self.dtype)
        cut = self.walked(Walk.slice, (whole,) if copied else SHORT)
        adapters = self.sizes.adapters
        # It begins with the moments of what was trained, and lets go of them.
        begun = self._weights + self.refitted + (1 + MOMENTS * bool(self._steps)) * adapters
        saved = self.results[0]
        if self.stored is not None:  # mapped, and copied to be written in another dtype
            saved *= copied * self.stored.itemsize / self.dtype.itemsize
        save = Phase("save", Need((saved + adapters,)), FORMULA)
        sent = Need((begun,), moved={"gathered": sum(self.results)})  # by the main process
        return [Phase("slice", sent.then(cut)), save]

    # -- the disk

    def disk(self) -> dict[str, float]:
        """Return the bytes that a run writes, by purpose."""
        args, sizes, count = self.args, self.sizes, len(self.targets)
        files = self.written.itemsize / self.dtype.itemsize
        refitted, teachers = sizes.refitted * args.refit, 0.0
        if args.progressive:
            moving: Any = args
            teachers = sum(moving.schedule(x).snapshots for x in self.targets)
        # Two are kept, one is written; masks that move are in it with what is refitted.
        checkpoints = 3 * (3 * sizes.adapters + refitted * args.progressive)
        return {
            "result": sum(self.results) * files,
            "refitted": refitted * count,
            "cut": self.results[0] * files,  # the same as the result, until it is written
            "checkpoints": checkpoints * count * bool(args.max_steps),
            "teachers": teachers * sizes.adapters / 2,
        }
