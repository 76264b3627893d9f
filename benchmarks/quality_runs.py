"""The runs of the quality table: each is a cell, and each cell a JSON file written as it ends."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from nuteprune.train.calibration import priced, refit_on, score_in_rounds, stops_before
from quality_text import Judge, Setting, Texts
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from nuteprune import NutePruneConfig, NutePruneTrainer, RunFailed, UserError
from nuteprune.cli.app import quiet_libraries
from nuteprune.data.blocks import BlockDataset
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.masks import Masks
from nuteprune.jobs.sources import load_model, load_tokenizer, pick_dtype
from nuteprune.judge.perplexity import protocol
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Projection
from nuteprune.model.hooks import MaskHooks
from nuteprune.shrink.compensate import Fit, Install
from nuteprune.train.config import METHOD
from nuteprune.train.setup import make_allocator
from nuteprune.train.state import last_checkpoint


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        label: what the table calls it.
        settings: of `NutePruneConfig`, on top of the table's.
        target: sparsity.
        steps: optimizer steps; 0: nothing is trained, and the cell has a re-fitted column too.
        seed: draws the text, its order and what is random in the method.
    """

    label: str
    settings: dict[str, Any]
    target: float
    steps: int
    seed: int

    @property
    def file_name(self) -> str:
        """Name of the cell's file."""
        label = self.label.replace(" ", "-").replace("+", "and-")
        return f"{label}_{100 * self.target:g}_{self.steps}-steps_seed-{self.seed}.json"


OLD_NAME = "nuteprune"
"""What records of 0.1.0 call the default's method."""
DENSE = "dense.json"
"""File of the dense model's record."""
SETTING = "setting.json"
"""File of what cells share."""


class Bench:
    """Runs cells, or takes what an earlier run of the same table has left of them.

    Args:
        setting: what cells share.
        folder: where their files are.
        say: told about each cell in one line.
        other_text: folder of other text, if the setting has some.

    Raises:
        UserError: if the folder holds a table of another setting.
    """

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        say: Callable[[str], None] = lambda line: None,
        other_text: Path | None = None,
    ) -> None:
        self.setting, self.folder, self.say = setting, folder, say
        self.other_text = other_text
        self._scores: dict[tuple[Any, ...], tuple[dict[str, Tensor], float]] = {}
        path = folder / SETTING
        if path.exists() and Setting.read(path) != setting:
            raise UserError(
                f"{folder} holds a table of other settings ({path.name}); name another --out"
            )
        setting.mixture()  # tells of shares that do not fit
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(setting))

    # -- what cells need, made once

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(self.setting.model)

    @cached_property
    def texts(self) -> Texts:
        """What cells are calibrated and trained on."""
        return Texts(self.setting, self.tokenizer, self.folder)

    @cached_property
    def judge(self) -> Judge:
        """What cells are judged by."""
        return Judge(self.setting, self.tokenizer, self.texts.specs, self.other_text)

    @cached_property
    def anatomy(self) -> Anatomy:
        """The dense model of the untrained cells."""
        return Anatomy(self._load())

    @cached_property
    def _hooks(self) -> MaskHooks:
        return MaskHooks(self.anatomy)

    def _load(self) -> PreTrainedModel:
        model = load_model(self.setting.model, pick_dtype(self.setting.dtype, self.setting.device))
        return model.to(self.setting.device).requires_grad_(False)  # type: ignore[arg-type]

    def config(self, cell: Cell, folder: str) -> NutePruneConfig:
        """Return the settings of a cell's run."""
        return NutePruneConfig(
            output_dir=folder,
            **{
                "save_strategy": "steps",
                "save_steps": 50,
                "save_total_limit": 1,
                "disable_tqdm": True,
                "use_cpu": self.setting.device == "cpu",
                "target_sparsity": cell.target,
                "max_steps": cell.steps,
                "seed": cell.seed,
                **self.setting.settings,
                **cell.settings,
            },
        )

    def text(self, model: PreTrainedModel, cell: Cell, config: NutePruneConfig) -> BlockDataset:
        """Return what a cell is calibrated and trained on: the same for all methods."""
        plain = self.config(replace(cell, settings={}), config.output_dir)
        return self.texts.training(model, config, plain)

    # -- cells

    def dense(self) -> dict[str, Any]:
        """Return the record of the dense model."""
        return self._kept(DENSE, "the dense model", self._judge_dense)

    @property
    def begun(self) -> bool:
        """Whether the table has its first record, the dense model's."""
        return (self.folder / DENSE).exists()

    def has(self, cell: Cell) -> bool:
        """Return whether a cell has been run."""
        return (self.folder / cell.file_name).exists()

    @property
    def files(self) -> set[str]:
        """The names of all records of cells, whatever table they are of."""
        return {x.name for x in self.folder.glob("*_*-steps_seed-*.json")}

    def shown(self, name: str) -> dict[str, Any]:
        """Return the record of a cell that has been run, by the name of its file."""
        record: dict[str, Any] = json.loads((self.folder / name).read_text("utf-8"))
        return record

    def run(self, cell: Cell) -> dict[str, Any]:
        """Return a cell's record: from its file, or else by running it."""
        kind = self._train if cell.steps else self._score_only
        record = self._kept(cell.file_name, cell.file_name, lambda: self._attempt(kind, cell))
        default = {"method": METHOD}
        kept = {k: METHOD if x == OLD_NAME else x for k, x in record["settings"].items()}
        if default | kept != default | cell.settings:
            raise UserError(
                f"{self.folder / cell.file_name} is of other settings than {cell.label} has now; "
                "remove it to run it again"
            )
        return record

    def _kept(self, name: str, what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / name
        if not path.exists():
            self.say(f"running {what}")
            write_json(path, {**make(), "machine": machine()})
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record

    def _attempt(self, kind: Callable[[Cell], dict[str, Any]], cell: Cell) -> dict[str, Any]:
        """Run a cell; what cannot be done is a result too, and the table goes on."""
        try:
            return {**asdict(cell), **kind(cell)}
        except (RunFailed, UserError) as error:
            return {**asdict(cell), "refused": str(error)}

    def _judge_dense(self) -> dict[str, Any]:
        started = time.monotonic()
        return {
            **self.judge.figures(self.anatomy.model),
            "params": self.anatomy.parameters(),
            "protocol": {**protocol(self.judge.held_out), **self.judge.protocol()},
            "seconds_to_judge": round(time.monotonic() - started, 1),
        }

    def _score_only(self, cell: Cell) -> dict[str, Any]:
        """Mask the dense model by one-shot scores, judge it, re-fit it, and judge it again."""
        with tempfile.TemporaryDirectory() as folder:
            config = self.config(cell, folder)
        allocator = make_allocator(self.anatomy, config)
        text = self.text(self.anatomy.model, cell, config)
        scores, scoring_seconds = self.score(text, config, allocator, cell.target)
        started = time.monotonic()
        shape = allocator.shape(scores, cell.target)
        masks = allocator.masks(shape, scores).to(self.setting.device)
        seconds = scoring_seconds + time.monotonic() - started
        plain = self._judge_masked(masks)
        refitted, refit_seconds = self.refitted(text, config, masks)
        budget = allocator.budget
        removed = budget.before - budget.parameters(shape)
        return {
            "sparsity": removed / budget.before,
            "params": self.anatomy.parameters() - removed,
            **plain,
            "seconds": round(seconds, 3),
            "refitted": {**refitted, "seconds": round(seconds + refit_seconds, 3)},
        }

    def refitted(
        self, text: BlockDataset, config: NutePruneConfig, masks: Masks
    ) -> tuple[dict[str, Any], float]:
        """Return the figures of the model that is re-fitted to masks, and the seconds it took."""
        started = time.monotonic()
        with self._weights_put_back() as install:
            refit_on(text, config, self.anatomy, self._hooks, masks, install)
            seconds = time.monotonic() - started
            return self._judge_masked(masks), seconds

    def score(
        self, text: BlockDataset, config: NutePruneConfig, allocator: Allocator, target: float
    ) -> tuple[dict[str, Tensor], float]:
        """Return a method's scores and the seconds they took; once where they are the same."""
        kinds = allocator.constraints.kinds
        # Those that follow what is measured at the target are of that target.
        at = (target,) if priced(config, kinds) else ()
        key = (config.method, config.seed, *stops_before(target, config, kinds), *at)
        if key not in self._scores:
            started = time.monotonic()
            scores = score_in_rounds(
                text,
                config,
                self.anatomy,
                self._hooks,
                allocator,
                target,
                self._weights_put_back,
            )
            self._scores[key] = (scores, time.monotonic() - started)
        return self._scores[key]

    def _judge_masked(self, masks: Masks) -> dict[str, Any]:
        """Judge by masks: the same function as the sliced model's, without cutting anything."""
        with self._hooks.using(masks):
            return self.judge.figures(self.anatomy.model)

    @contextmanager
    def _weights_put_back(self) -> Iterator[Install]:
        """Give what installs a re-fit, and undo what it did to output and down projections."""
        family = self.anatomy.family
        last = (family.attention[-1], family.mlp[-1])
        layers = range(len(self.anatomy.layers))
        linears = [x for i in layers for p in last if (x := self.anatomy.linear(i, p)) is not None]
        weights = [linear.weight.detach().clone() for linear in linears]

        def install(layer: int, projection: Projection, fit: Fit) -> None:
            linear = self.anatomy.linear(layer, projection)
            assert linear is not None
            linear.weight.copy_(fit.weight_OI)

        try:
            yield install
        finally:
            with torch.no_grad():
                for linear, weight in zip(linears, weights, strict=True):
                    linear.weight.copy_(weight)

    def _train(self, cell: Cell) -> dict[str, Any]:
        """Train, finalize and judge; a run that was cut short goes on from its last checkpoint."""
        for name in ("_hooks", "anatomy"):  # one model in memory
            self.__dict__.pop(name, None)
        run = self.folder / "runs" / Path(cell.file_name).stem
        config = self.config(cell, str(run))
        model = self._load()
        text = self.text(model, cell, config)
        started = time.monotonic()
        trainer = NutePruneTrainer(model, config, text, self.tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last_checkpoint(run) is not None)
        small = trainer.finalize()
        seconds = time.monotonic() - started
        shutil.rmtree(run)
        found = self.judge.figures(small)
        after = sum(p.numel() for p in small.parameters())
        sparsity = trainer.allocator.budget.sparsity(trainer.ending.finished.shape)
        teachers = len(trainer.teachers)
        del trainer, model, small
        gc.collect()  # a trainer and its callbacks hold each other
        return {
            "sparsity": sparsity,
            "params": after,
            **found,
            "seconds": round(seconds, 3),
            "teachers": teachers,
        }


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file: complete, or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def results(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Return what a script finds, or what `--show` names; print its table, and write `--json`."""
    quiet_libraries()
    if args.show:
        found: dict[str, Any] = json.loads(args.show.read_text(encoding="utf-8"))
    else:
        found = run(args)
        if args.json:
            write_json(args.json, found)
    print(table(found))
    return found


def machine() -> dict[str, Any]:
    """Return what figures depend on beside the code's settings."""
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "python": platform.python_version(),
        **{name: version(name) for name in ("nuteprune", "torch", "transformers", "peft")},
    }
