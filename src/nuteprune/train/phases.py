"""What each phase of a run takes: memory and work, from a config alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from nuteprune.data.blocks import JUDGED
from nuteprune.data.openings import TEXT_TOKENS
from nuteprune.distill.teachers import kind_met
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.importance import METHODS
from nuteprune.gates.masks import Masks
from nuteprune.gates.schedule import Schedule
from nuteprune.model.anatomy import Anatomy
from nuteprune.train.asked import SETTINGS
from nuteprune.train.calibration import PLAIN_BATCH, priced, refits, stops_before
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.extrapolate import ONE_BY_ONE, SHORT, Need, extended, in_batches, shortened
from nuteprune.train.kernels import of_all_widths
from nuteprune.train.own_text import GUARD, tokens_to_write
from nuteprune.train.pricing import usual_changes
from nuteprune.train.setup import make_allocator
from nuteprune.train.simulate import Simulation, model_of
from nuteprune.train.sizes import Sizes
from nuteprune.train.targets import Prices, run_targets

SIMULATED = "simulated"
FORMULA = "formula"
RAMP, WITH_TEACHERS, FIXED = "step, ramp", "step, ramp and teachers", "step, fixed masks"
"""Kinds of steps."""
PRICING = "cutting more and less"
MOMENTS = 3
"""What Adam holds of a trained parameter, as a multiple: itself and two moments."""


@dataclass(frozen=True)
class Phase:
    """A phase of a run.

    Args:
        name: what users call it.
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
class Run:
    """A run to be planned.

    Args:
        config: of the dense model.
        args: the run's settings.
        length: tokens per block.
        dtype: what is computed in.
        sizes: of the model's parts.
        allocator: which shapes it can be cut to.
        targets: the sparsities that it is to reach, growing.
        of_a_token: `active_before` and `active_after` at each target; empty where there are no
            experts.
        kind: the model's class; None: the stock one of the config.
        judged: blocks of held-out text; None: not known, and one batch is gone through.
        stored: dtype of the checkpoint, if the run is on a CPU. Peaks are then of what no file
            stands behind: weights are mapped, unless the run computes in another dtype. None: a
            device, which holds all.
        own: share of the text that the model writes itself.
        packed: whether weights are in few bits or sharded, so that units are scored once.
        written: dtype of the files of a checkpoint; None: that of the run.
    """

    config: PreTrainedConfig
    args: NutePruneConfig
    length: int
    dtype: torch.dtype
    sizes: Sizes
    allocator: Allocator
    targets: tuple[float, ...]
    of_a_token: tuple[dict[str, int], ...]
    kind: type[PreTrainedModel] | None = None
    judged: int | None = None
    stored: torch.dtype | None = None
    own: float = GUARD
    packed: bool = False
    written: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        args: NutePruneConfig,
        length: int,
        dtype: torch.dtype,
        kind: type[PreTrainedModel] | None = None,
        judged: int | None = None,
        stored: torch.dtype | None = None,
        own: float = GUARD,
        packed: bool = False,
    ) -> Run:
        """Look at the model of a config, without making its weights.

        Raises:
            UserError: for settings that this model cannot take.
        """
        written = stored or getattr(config, "dtype", None)  # files are in the checkpoint's dtype
        written = written if isinstance(written, torch.dtype) else dtype
        with torch.device("meta"):
            anatomy = Anatomy(model_of(config, dtype, kind))
        allocator = make_allocator(anatomy, args)
        sizes = Sizes.of(anatomy, args, length, allocator.constraints.kinds)
        prices = Prices.of(anatomy, written, args)
        goals, scores = run_targets(allocator, args, prices), allocator.chance_scores()
        targets = tuple(x.sparsity for x in goals)
        each = (prices.of_a_token(allocator.shape(scores, x.goal)) for x in goals)
        found = tuple(x for x in each if x)
        end = (targets, found, kind, judged, stored, own, packed, written)
        return cls(config, args, length, dtype, sizes, allocator, *end)

    @property
    def schedule(self) -> Schedule:
        """When it reaches its targets."""
        return Schedule(self.targets, self.args.max_steps, *self.args.shares)

    @property
    def snapshots(self) -> bool:
        """Whether teachers are met on the way."""
        return kind_met(self.args.teacher, self.schedule) == "snapshots"

    def simulated(
        self, phase: Callable[[Simulation], Need], short: tuple[int, int] = SHORT
    ) -> Need:
        """Go through a phase without data."""
        return self._extended(lambda config: phase(self._simulation(config)), short)

    def _extended(self, run: Callable[[PreTrainedConfig], Need], short: tuple[int, int]) -> Need:
        return extended(self.config, run, short, self.allocator.layout.shape.layers)

    def _simulation(self, config: PreTrainedConfig, masks: Masks | None = None) -> Simulation:
        how: dict[str, Any] = {"kind": self.kind, "stored": self.stored, "masks": masks}
        return Simulation(config, self._by_share(config), self.length, self.dtype, **how)

    def _by_share(self, config: PreTrainedConfig) -> NutePruneConfig:
        """Return the settings for a model of fewer layers, which is to lose the same share.

        Sizes, speeds, counts of layers and tables of costs are those of the whole model.
        """
        args, kind = copy.copy(self.args), self.args.asked[0].kind
        for name in SETTINGS:
            setattr(args, name, None)
        args.costs = None
        if kind in ("speedup", "shape"):  # which may bring kinds of their own
            args.gates = ",".join(self.allocator.constraints.kinds)
        with torch.device("meta"):
            anatomy = Anatomy(model_of(config, self.dtype, self.kind))
        args.target_sparsity = 0.0
        most = make_allocator(anatomy, args).maximum()
        if most < min(self.targets):  # as where the first layer has to keep its attention
            args.gates = None
            most = make_allocator(anatomy, args).maximum()
        reached = dict.fromkeys(min(x, most) for x in self.targets)
        args.target_sparsity = list(reached)
        return args

    def _step(self, moving: bool = False, snapshot: bool = False) -> Need:
        def phase(simulation: Simulation) -> Need:
            return simulation.step(moving, snapshot)

        need, narrow = self.simulated(phase), snapshot or not moving
        if self.stored is None or not narrow or hasattr(self.config, "pruned"):
            return need
        # Layers of the same widths share kernels, so these do not grow layer by layer.
        masks = of_all_widths([self.allocator.chance(x) for x in self.targets])
        if masks is None:
            return need
        config = shortened(self.config, len(masks.layout.shape.layers))
        return replace(need, sizes=phase(self._simulation(config, masks)).sizes)

    def phases(self) -> list[Phase]:
        """Return all phases, in their order."""
        found = [*self.before_steps(), *self.steps(), *self.after_steps()]
        return [replace(x, need=x.need + Need(self.left.get(x.name, 0), 0)) for x in found]

    @property
    def priced(self) -> bool:
        """Whether scores follow what is measured at the target."""
        kinds = self.allocator.constraints.kinds
        return self.args.scored_blocks > 0 and priced(self.args, kinds, self.packed)

    @property
    def refitted(self) -> int:
        """Bytes of re-fitted weights beside the base's own, at most; CPUs map them."""
        return self.sizes.refitted if self.args.compensation and self.stored is None else 0

    @property
    def left(self) -> dict[str, float]:
        """Phase -> bytes of re-fitted weights that earlier rounds or targets have left there."""
        kinds, later = self.allocator.constraints.kinds, len(self.targets) > 1
        tried = bool(stops_before(self.targets[-1], self.args, kinds, self.packed))
        copies = {
            "scoring": tried,
            "cutting units one by one": tried,
            PRICING: True,
            RAMP: later,
            WITH_TEACHERS: 2 * later,  # a teacher has its own
            FIXED: later and self.snapshots,
        }
        return {name: float(count) * self.refitted for name, count in copies.items()}

    @cached_property
    def _judging(self) -> Need:
        return self.simulated(Simulation.judging)

    def before_steps(self) -> list[Phase]:
        """Return what comes before the first step."""
        args, method = self.args, METHODS[self.args.method]
        block = self._judging.flops / JUDGED
        found = [
            Phase("judging the dense model", self._judging.times((self.judged or JUDGED) / JUDGED))
        ]
        if self._written:
            need = self._writing(block)
            found.append(Phase("writing text", need, FORMULA, read=self._read_to_write()))
        kinds = self.allocator.constraints.kinds
        rounds = 1 + len(stops_before(self.targets[-1], args, kinds, self.packed))
        if args.scored_blocks:  # masks that are learned ask for no scores
            scoring = self.simulated(Simulation.sloping).times(args.calibration_blocks)
            if method.reads_plain:
                plain = args.calibration_blocks * method.reads_plain / PLAIN_BATCH
                # Apart, since many layers hold most in the one and few in the other.
                scoring = scoring.then(self._one_by_one(Simulation.scoring, plain))
            found.append(Phase("scoring", scoring.times(rounds)))
        units = sum(self.allocator.layout.units(k) for k in kinds if k in ("heads", "kv_groups"))
        if args.scored_blocks and method.cuts and units:
            copying = self.simulated(Simulation.copying)
            # Each unit alone, from its own layer on: half of the layers on the average.
            turns = units / 2
            found.append(Phase("cutting units one by one", copying.times(turns * rounds)))
        if self.priced:
            found.append(Phase(PRICING, self._pricing(block), FORMULA))
        if args.compensation:
            batches = args.refit_blocks / args.per_device_train_batch_size
            refit = self._one_by_one(Simulation.refitting, batches)
            if args.max_steps and (self.schedule.stage(0).freeze_step or len(self.targets) > 1):
                refit += Need((MOMENTS - 1) * self.sizes.adapters, 0)  # it is between steps
            times = refits(self.targets, args, kinds, self.packed)
            found.append(Phase("re-fit", refit.times(times)))
        return found

    def _pricing(self, block: float) -> Need:
        """Measure what units cost at the target; see `train.pricing`."""
        shape = self.allocator.budget.shape
        tokens = self.args.priced_blocks * self.length
        # The dense model's logits and the outputs of all layers are held.
        held = (
            tokens
            * (self.config.vocab_size + len(shape.layers) * shape.hidden)
            * self.dtype.itemsize
        )
        sizes, kinds = self.allocator.layout.sizes, self.allocator.constraints.kinds
        changes = sum(usual_changes(kind, size) for kind in kinds for size in sizes[kind])
        # Each from its own layer on: half of the layers on the average.
        work = block * self.args.priced_blocks * changes / 2
        return replace(self._judging, flops=work, fine=0) + Need(held, 0)

    def _one_by_one(self, phase: Callable[[Simulation, int], Need], batches: float) -> Need:
        """Go through a phase in which batches pass a layer together."""

        def run(config: PreTrainedConfig) -> Need:
            return in_batches(lambda count: phase(self._simulation(config), count), batches)

        return self._extended(run, ONE_BY_ONE)

    def _writing(self, block: float) -> Need:
        held = self._weights + self.sizes.adapters + self.sizes.cached
        return Need(held, block * self._written)

    @property
    def _written(self) -> int:
        """Blocks that the model writes itself."""
        tokens = tokens_to_write(self.args, self.own, self.length) if self.own else 0
        return tokens // self.length

    def _read_to_write(self) -> float:
        """Bytes that are read while texts take a token at a time, as if none were a chat.

        All weights at each position, and on the average half of the keys and values.
        """
        sizes, short = self.sizes, min(TEXT_TOKENS, self.length)
        texts = math.ceil(self._written * self.length / short)
        together = min(sizes.together, texts)
        cached = sizes.cached * short / self.length * together / sizes.together
        return math.ceil(texts / together) * short * (sizes.read + cached / 2)

    @property
    def _weights(self) -> float:
        """Bytes of the dense model that count."""
        return 0 if self.stored == self.dtype else self.sizes.weights

    def steps(self) -> list[Phase]:
        """Return the kinds of steps that the run has."""
        args = self.args
        each = args.gradient_accumulation_steps
        ramp = sum(min(x.end, x.freeze_step) - x.first for x in self.schedule.stages)
        found = []
        if ramp > 0:
            snapshots = self.snapshots
            name = WITH_TEACHERS if snapshots else RAMP
            need = self._step(moving=True, snapshot=snapshots)
            found.append(Phase(name, need.times(each * ramp), steps=ramp))
        if args.max_steps > ramp:
            need = self._step()
            steps = args.max_steps - ramp
            found.append(Phase(FIXED, need.times(each * steps), steps=steps))
        return found

    @property
    def results(self) -> list[float]:
        """Bytes of the model of each target, in the dtype of the run; the smallest last."""
        return [self.sizes.weights - x * self.sizes.projections for x in self.targets]

    def after_steps(self) -> list[Phase]:
        """Return what comes after the last step."""
        # Few layers hold most when what is in none is cut. Many copied ones hold most before that.
        whole = self.config.num_hidden_layers
        copied = self.stored not in (None, self.dtype)
        final = self.simulated(Simulation.finalizing, (whole, whole) if copied else SHORT)
        # It begins with the moments of what was trained, and lets go of them.
        moments = MOMENTS if self.args.max_steps else 1
        begun = Need(self._weights + self.refitted + moments * self.sizes.adapters, 0)
        saved = self.results[0]
        if self.stored is not None:  # mapped, and copied to be written in another dtype
            differs = self.stored != self.dtype
            saved *= differs * self.stored.itemsize / self.dtype.itemsize
        saving = Need(saved + self.sizes.adapters, 0)
        found = [Phase("finalize", begun.then(final)), Phase("saving", saving, FORMULA)]
        if self.judged is not None:
            gone = self._weights - (self.results[0] if self.stored is None else 0)
            passes = sum(self.results) / self.sizes.weights * self.judged / JUDGED
            need = (self._judging - Need(gone, 0)).times(passes)
            found.append(Phase("judging the results", need, FORMULA))
        return found
