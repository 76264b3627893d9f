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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from quality_text import Judge, Setting, Texts
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from nuteprune import NutePruneConfig, RunFailed, UserError
from nuteprune.cli.app import quiet_libraries
from nuteprune.console import silent
from nuteprune.data.training_text import BlockDataset
from nuteprune.gates import METHOD
from nuteprune.gates.masks import Masks
from nuteprune.jobs.sources import load_model, load_tokenizer, pick_dtype
from nuteprune.judge.perplexity import protocol
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.lora import Weights
from nuteprune.products import Products
from nuteprune.train.config import prune_config
from nuteprune.train.first_stages import FirstStages
from nuteprune.train.prepare import prepare
from nuteprune.train.state import last_checkpoint


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        label: what the table calls it.
        settings: of `NutePruneConfig`, on top of the table's.
        target: sparsity.
        steps: optimizer steps; 0: nothing is trained, and the cell has a refitted column too.
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

    # -- what each cell has of its own

    def model(self) -> PreTrainedModel:
        """Return the dense model, loaded anew."""
        model = load_model(self.setting.model, pick_dtype(self.setting.dtype, self.setting.device))
        return model.to(self.setting.device).requires_grad_(False)  # type: ignore[arg-type]

    def config(self, cell: Cell, folder: str) -> NutePruneConfig:
        """Return the settings of a cell's run."""
        settings = {
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
        }
        return prune_config(settings)(output_dir=folder, **settings)

    def text(self, model: PreTrainedModel, cell: Cell, config: NutePruneConfig) -> BlockDataset:
        """Return what a cell is calibrated and trained on: the same for all methods."""
        plain = self.config(replace(cell, settings={}), config.output_dir)
        return self.texts.training(model, config, plain)

    def cut(self, cell: Cell, folder: Path, keeps: bool = False) -> FirstStages:
        """Return a cell's stages before the first step.

        Args:
            cell: the cell.
            folder: where files of its run are.
            keeps: whether what the stages leave is kept there, and taken from there.
        """
        config, model = self.config(cell, str(folder)), self.model()
        text = self.text(model, cell, config)
        products = Products(folder if keeps else None, {}, resumes=keeps)
        return FirstStages(prepare(model, config), config, text, products, silent)

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
        if default | record["settings"] != default | cell.settings:
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
        started, model = time.monotonic(), self.model()
        return {
            **self.judge.figures(model),
            "params": Anatomy(model).parameters(),
            "protocol": {**protocol(self.judge.held_out), **self.judge.protocol()},
            "seconds_to_judge": round(time.monotonic() - started, 1),
        }

    def _score_only(self, cell: Cell) -> dict[str, Any]:
        """Mask the dense model by one-shot scores, judge it, refit it, and judge it again."""
        with tempfile.TemporaryDirectory() as folder:
            cut = self.cut(cell, Path(folder))
            target = cut.model.targets[-1]
            masks = cut.choose(cut.score(), target)
            plain = {**self.judged(cut, masks), "seconds": seconds_of(cut.products)}
            refitted = {}
            if (weights := cut.refit(masks, target)) is not None:
                figures = self.judged(cut, masks, weights)
                refitted = {"refitted": {**figures, "seconds": seconds_of(cut.products)}}
        sparsity, before = cut.model.allocator.sparsity(masks), cut.model.allocator.budget.before
        removed = round(sparsity * before)
        return {
            "sparsity": sparsity,
            "params": cut.model.origin.parameters - removed,
            **plain,
            **refitted,
        }

    def judged(
        self, cut: FirstStages, masks: Masks, weights: Weights | None = None
    ) -> dict[str, Any]:
        """Judge by masks: the same function as the sliced model's, without cutting anything.

        Args:
            cut: has the model.
            masks: what is kept.
            weights: what `refit` returned for them; None: the dense model's.
        """
        model = cut.model
        with model.bank.kept(), model.hooks.using(masks):
            model.bank.install(weights or {})
            return self.judge.figures(model.anatomy.model)

    def _train(self, cell: Cell) -> dict[str, Any]:
        """Train, finalize and judge; a run that was cut short goes on from what it has left."""
        run = self.folder / "runs" / Path(cell.file_name).stem
        config = self.config(cell, str(run))
        model = self.model()
        text = self.text(model, cell, config)
        started = time.monotonic()
        kind = import_module(config.PIPELINE).TRAINER
        trainer = kind(model, config, text, self.tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last_checkpoint(run) is not None)
        small = trainer.finalize()
        seconds = time.monotonic() - started
        found = self.judge.figures(small)
        shutil.rmtree(run)  # its weights may be mapped from there
        result = {
            "sparsity": trainer.prepared.allocator.budget.sparsity(trainer.sliced.shape),
            "params": sum(p.numel() for p in small.parameters()),
            **found,
            "seconds": round(seconds, 3),
            "teachers": len(trainer.teachers_met()),
        }
        del trainer, model, small
        gc.collect()  # a trainer and its callbacks hold each other
        return result


def seconds_of(products: Products) -> float:
    """Return what the stages so far have taken."""
    return round(sum(cost["seconds"] for cost in products.costs.values()), 6)


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
