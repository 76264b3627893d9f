"""Calls the stages with a run's settings, text and products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel

from nuteprune.console import Progress
from nuteprune.data.held_out import HeldOut
from nuteprune.data.training_text import TrainingText
from nuteprune.export.loading import in_dtype
from nuteprune.files import write_json
from nuteprune.gates.masks import Masks
from nuteprune.judge.perplexity import protocol
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.lora import Weights
from nuteprune.model.weights import bring_home, shard_base
from nuteprune.processes import is_main, main_ones
from nuteprune.products import Products
from nuteprune.run_folder import SAMPLES, SELF_WRITTEN
from nuteprune.stages.judge import Figures, entries, judge, judge_beside
from nuteprune.stages.slice import Sliced
from nuteprune.stages.write import write
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.first_stages import FirstStages
from nuteprune.train.prepare import Prepared, offload_if_asked
from nuteprune.train.state import last_checkpoint
from nuteprune.train.targets import Target
from nuteprune.train.trainer import NutePruneTrainer

if TYPE_CHECKING:
    from nuteprune.export.wrapping import Around

Record = dict[str, Any]


@dataclass
class Run:
    """A run; stages are methods, in the order of `pipeline`, or of what `first_stages` returns.

    Args:
        model: the dense model, prepared.
        args: the run's settings.
        text: the calibration and training text.
        held_out: the text to judge by, source -> (N, T).
        products: what the stages leave.
        progress: called with the progress of each stage.
        first: the trainer of the first target.
        trainer_of: makes the trainer of a target.
        reload: loads the dense model anew, whole, in a dtype; None: as it is stored.
        run_folder_of: where a target's products and checkpoints of training go; its checkpoint goes
            above.
        resumes: whether the run goes on with what is in its folder.
        around: the other parts of a model of several modalities; None: there are none.
        about: further keys of each record.
        steps_in_time: how many steps a target has; None: as many as the settings say.
    """

    model: Prepared
    args: NutePruneConfig
    text: TrainingText
    held_out: HeldOut
    products: Products
    progress: Progress
    first: NutePruneTrainer
    trainer_of: Callable[[Target], NutePruneTrainer]
    reload: Callable[[Any], PreTrainedModel]
    run_folder_of: Callable[[Target], Path]
    resumes: bool
    around: Around | None
    about: Callable[[], Record]
    steps_in_time: Callable[[Run, NutePruneTrainer], int] | None = None

    def __post_init__(self) -> None:
        lora = self.model.bank.state() if len(self.targets) > 1 else {}
        self._dense: PreTrainedModel | None = None
        self._figures: Figures | None = None
        self._fresh = {name: value.cpu().clone() for name, value in lora.items()}

    @property
    def targets(self) -> tuple[Target, ...]:
        """What the model is to become, the largest first."""
        return self.model.targets

    def each_target(self) -> Iterator[Target]:
        """Yield the targets, and restore the dense model for each."""
        for target in self.targets:
            if target is not self.targets[0]:
                self.model.bank.load(self._fresh)
            yield target

    def write(self) -> None:
        """Let the dense model write its share of the text, if it has one."""
        text, folder = self.text, self.products.folder
        if not text.to_write or folder is None:
            return
        kept = folder / SELF_WRITTEN
        before = kept.stat().st_mtime_ns if kept.is_file() else 0
        with self.products.measured("write"), self.model.model.disable_adapter():
            written = write(
                self.model.anatomy.model,
                text.tokenizer,
                tokens=text.to_write,
                length=text.length,
                seed=text.seed,
                folder=folder,
                progress=in_percent(self.progress),
                team=self.model.team,
            )
        text.use_written(written)
        if before and kept.stat().st_mtime_ns == before:
            self.products.found.append("write")

    def judge_dense(self) -> Figures | None:
        """Judge the dense model; None if the run's weights are in too few bits to be judged."""
        if self.model.is_packed:
            return None
        with self.model.model.disable_adapter():
            return self._judge_dense(self.model.anatomy.model)

    def _judge_dense(self, model: PreTrainedModel) -> Figures:
        make = partial(judge, model, name="the dense model", **self._judged_by)
        found: Figures = self.products.keep_json("judge", make, held_out=protocol(self.held_out))
        return found

    @property
    def _judged_by(self) -> dict[str, Any]:
        how = {"progress": self.progress, "team": self.model.team}
        return {"held_out": self.held_out, "tokenizer": self.text.tokenizer, **how}

    def first_stages(self) -> FirstStages:
        """Return the stages before the first step, ready to go: score, choose, refit."""
        text, products = self.text.training, self.products
        return FirstStages(self.model, self.args, text, products, self.progress, self.run_folder_of)

    def teach(
        self, target: Target, masks: Masks | None = None, weights: Weights | None = None
    ) -> NutePruneTrainer:
        """Distil the model that masks cut, if there are steps, and return its trainer.

        Without masks and weights the trainer finds them.

        Args:
            target: the target of this checkpoint.
            masks: the units to keep.
            weights: what `refit` returned for these masks.
        """
        trainer = self.first if target is self.targets[0] else self.trainer_of(target)
        trainer.masks, trainer.weights = masks, weights
        if self.steps_in_time is not None:
            self.args.max_steps = trainer.args.max_steps = main_ones(
                self.steps_in_time(self, trainer)
            )
        with self.products.measured("teach"):
            if self.args.max_steps > 0:
                begun = self.resumes and last_checkpoint(trainer.run_folder) is not None
                trainer.train(resume_from_checkpoint=begun or None)
            trainer.settle()
        return trainer

    def slice(self, trainer: NutePruneTrainer, target: Target) -> Sliced:
        """Merge, fold and cut; for the last target the run's own model, if possible."""
        with self.products.measured("slice"):
            if target is self.targets[-1]:
                reloads = self.model.must_be_reloaded
                trainer.finalize((lambda: self.reload(None)) if reloads else None)
            else:
                trainer.cut_copy(self.reload(None))
        assert trainer.sliced is not None
        return trainer.sliced

    def judge(self, sliced: Sliced, dense: Figures | None) -> Record:
        """Judge a smaller model as its file will compute, beside the dense one.

        Returns:
            What a record says of it, and `samples` of answers where there are some.
        """
        computed = self.model.origin.computed_dtype
        if self._dense is None:  # only now: a run with one target has used its own up
            self._dense = self._placed(self.reload(computed))
        if dense is None:  # packed: its figures serve all targets
            dense = self._figures = self._figures or self._judge_dense(self._dense)
        with self.products.measured("judge"):
            small = self._smaller(sliced.model)
            found = judge(small, name="the pruned model", **self._judged_by)
            self.progress("judge answers and context", 0, 1)
            text, team = self.held_out, self.model.team
            beside = judge_beside(self._dense, small, self.text.tokenizer, text, team=team)
            self.progress("judge answers and context", 1, 1)
            if self.args.offload:  # as it is written
                bring_home(sliced.model)
        return entries(self.held_out, dense, found) | beside

    def _smaller(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return a smaller model as its file will compute, where it is judged."""
        computed = self.model.origin.computed_dtype
        if not self.model.is_sharded:
            return self._placed(in_dtype(model, computed))
        shared = in_dtype(model, model.dtype, anew=True)  # the main process's own is to be saved
        shard_base(Anatomy(shared.requires_grad_(False)), self.args.device, sent_in=computed)
        return shared

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return a model that each process has, where it is judged."""
        anatomy = Anatomy(model.requires_grad_(False))
        if self.model.is_sharded:
            shard_base(anatomy, self.args.device)
            return model
        offload_if_asked(anatomy, self.args, self.model.origin)
        place = str(self.args.device) if self.model.has_whole_weights else "cpu"
        return cast(PreTrainedModel, model.to(place))  # type: ignore[arg-type]

    def save(self, trainer: NutePruneTrainer, judged: Record) -> dict[Path, Record]:
        """Write a checkpoint with its record; returns folder -> record, of the main process."""
        if not is_main():
            return {}
        figures = dict(judged)
        write_json(trainer.run_folder / SAMPLES, figures.pop("samples", []))
        folder = self.run_folder_of(trainer.target).parent
        costs = {"stages": self.products.costs, "peak_memory_bytes": self.products.peak}
        record = {**figures, **self.about(), **costs}
        return {folder: trainer.save_pruned(folder, around=self.around, **record)}


def in_percent(progress: Progress) -> Callable[[int, int], None]:
    """Return a progress function for tokens written, which reports each percent once."""
    last = -1

    def tell(done: int, total: int) -> None:
        nonlocal last
        if (percent := 100 * done // total) > last:
            last = percent
            progress("write, percent", percent, 100)

    return tell
