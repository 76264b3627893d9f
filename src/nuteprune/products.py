"""The products of a run's stages: files, the key that each depends on, and its cost.

A product is a file with a key: the settings and inputs that it depends on, those of the stages
before it among them. A resumed run takes each product whose key is its own, and goes on from the
first that is not there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nuteprune.errors import UserError
from nuteprune.files import atomic, to_json, write_text, writing
from nuteprune.memory import peak, reset_peak
from nuteprune.processes import agree, is_main, main_ones, share

Tensors = dict[str, Tensor]
Cost = dict[str, float]
"""`seconds`, `cpu_seconds`, `peak_memory_bytes`."""


class Products:
    """The products of a run's stages, in their order.

    Args:
        folder: the run's; None: nothing is kept.
        about: what all products depend on, such as the model and its text.
        resumes: whether to use existing products; else they are made anew.
    """

    def __init__(
        self, folder: Path | None, about: Mapping[str, Any], resumes: bool = False
    ) -> None:
        self.folder, self.resumes = folder, resumes
        self.costs: dict[str, Cost] = {}
        self.found: list[str] = []
        self._key: dict[str, Any] = json.loads(to_json(about))

    def depends(self, stage: str, **settings: Any) -> None:
        """Add settings that this stage and later ones depend on."""
        added = {f"{stage}.{name}": value for name, value in settings.items()}
        self._key |= json.loads(to_json(added))

    def keep(
        self,
        stage: str,
        make: Callable[[], Tensors],
        folder: Path | None = None,
        everywhere: bool = True,
        **settings: Any,
    ) -> Tensors:
        """Return a stage's tensors: the existing ones, or new ones, which are written.

        Args:
            stage: its name.
            make: makes them.
            folder: where the product is; None: the run's folder.
            everywhere: whether all processes get the values; else only the main one has data.
            **settings: what they depend on, beside the settings of earlier stages.
        """
        self.depends(stage, **settings)
        path = self._path(stage, folder or self.folder)
        found = share(self._find(stage, path), everywhere)
        if found is not None:
            return found
        with self.measured(stage):
            made = make()
        if everywhere:
            agree(made.values())
        return self._write(stage, path, made) if path is not None and is_main() else made

    def keep_json(self, stage: str, make: Callable[[], Any], **settings: Any) -> Any:
        """Return a stage's result for JSON: the main process's."""
        self.depends(stage, **settings)
        path = self._path(stage, self.folder, "json")
        kept = main_ones(_read_json(path) if self.resumes and path is not None else {})
        if kept.get("key") == self._key and kept.get("sum") == _sum(kept):
            self._note(stage, kept["cost"])
            return kept["value"]
        with self.measured(stage):
            made = main_ones(make())
        if path is not None and is_main():
            kept = {"key": self._key, "cost": self.costs[stage], "value": made}
            kept["sum"] = _sum(kept)
            with writing(path, "make room, then go on with --resume"):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, to_json(kept))
        return made

    @contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        """Add the time and memory spent in the context to a stage's cost."""
        reset_peak()
        begun, cpu_begun = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            cost = self.costs.setdefault(stage, {})
            took = {"seconds": time.monotonic() - begun}
            took["cpu_seconds"] = time.process_time() - cpu_begun
            for name, value in took.items():
                cost[name] = round(cost.get(name, 0.0) + value, 2)
            cost["peak_memory_bytes"] = max(cost.get("peak_memory_bytes", 0), peak())

    @property
    def peak(self) -> int:
        """The most memory that a stage took, in bytes."""
        return max((int(x["peak_memory_bytes"]) for x in self.costs.values()), default=0)

    def _path(self, stage: str, folder: Path | None, ending: str = "safetensors") -> Path | None:
        return None if folder is None or self.folder is None else folder / f"{stage}.{ending}"

    def _find(self, stage: str, path: Path | None) -> Tensors | None:
        """Return a stage's tensors if they exist under the current key; in the main process."""
        if path is None or not (is_main() and self.resumes and path.is_file()):
            return None
        try:
            tensors, notes = read_tensors(path)
        except UserError:  # cut off by a kill: it is made anew
            return None
        if notes.get("key") != self._key or not isinstance(notes.get("cost"), dict):
            return None
        self._note(stage, notes["cost"])
        return tensors

    def _note(self, stage: str, cost: Cost) -> None:
        self.costs[stage] = cost
        self.found.append(stage)

    def _write(self, stage: str, path: Path, tensors: Tensors) -> Tensors:
        """Write a product, and return it mapped from its file, or on its device."""
        about = {"key": self._key, "cost": self.costs[stage], "order": list(tensors)}
        with writing(path, "make room, then go on with --resume"):
            write_tensors(path, tensors, about)
        if any(x.device.type != "cpu" for x in tensors.values()):
            return tensors
        return read_tensors(path)[0]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write tensors and notes for JSON to a file, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry: safetensors writes several in an order that changes from run to run.
    about = {"notes": to_json(notes)}
    with atomic(path) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, about)


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of a file of `write_tensors`, mapped from it, and its notes.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads(file.metadata()["notes"])
            names = notes.get("order") or sorted(file.keys())
            return {name: file.get_tensor(name) for name in names}, notes
    except (AttributeError, KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        found.update(f"{name} {tuple(tensors[name].shape)}".encode())
        found.update(tensors[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _sum(kept: Mapping[str, Any]) -> str:
    """Return a hash of a result and its cost: one that was changed is made anew."""
    said = to_json([kept.get("cost"), kept.get("value")])
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut off by a kill: it is made anew
        return {}
    return found if isinstance(found, dict) else {}
