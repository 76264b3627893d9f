"""The engines that speed is measured in; each prepares a model for a worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from nuteprune.console import Bars
from nuteprune.errors import UserError
from nuteprune.export.record import weights_size
from nuteprune.jobs.sources import load_model, load_tokenizer, locate, pick_device, pick_dtype
from nuteprune.judge.llama_cpp import LlamaCppRunner, require_binding
from nuteprune.judge.units import dtype_name
from nuteprune.judge.work import Work
from nuteprune.judge.worker import Runner, TorchRunner
from nuteprune.model.family_file import from_dict, to_dict
from nuteprune.model.lookup import all_brought_along, bring_along

AUTO = "auto"
GGUF_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


@dataclass(frozen=True)
class Ready:
    """A model that a worker can load.

    Args:
        load: loads it, in the worker's process.
        bytes_on_disk: gives those of the files that it is loaded from, None where they cannot be
            told; a hub's are there once it was loaded.
    """

    load: Callable[[], Runner]
    bytes_on_disk: Callable[[], int | None]


@dataclass(frozen=True)
class Transformers:
    """Plain transformers, which loads a checkpoint as it is.

    Args:
        device: `cpu` or `cuda`.
        computed: the one to compute in.
        threads: on a CPU; None: as many as torch takes.
    """

    device: str
    computed: torch.dtype
    threads: int | None = None

    @classmethod
    def from_options(cls, device: str, dtype: str, threads: int | None = None) -> Transformers:
        """Return the engine that these options ask for; they may be `auto`."""
        kind = pick_device(device)
        return cls(kind, pick_dtype(dtype, kind), threads)

    @property
    def dtype(self) -> str:
        """The dtype of the weights, by torch's name."""
        return dtype_name(self.computed)

    def prepare(self, model: str, place: Path, bars: Bars) -> Ready:
        """Make a model ready; nothing is written.

        Args:
            model: as the user named it.
            place: a path that is free for it, in a folder that lives as long as the workers.
            bars: where progress is shown.
        """
        own = tuple(map(to_dict, all_brought_along()))
        return Ready(partial(self._load, model, own), partial(_on_disk, model))

    def _load(self, model: str, own: tuple[dict[str, Any], ...]) -> TorchRunner:
        """Load a model in the worker's process, after registering the users' families there."""
        for entry in own:
            bring_along(from_dict(entry, Path("--family")))
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        loaded = load_model(model, self.computed)
        loaded.to(self.device)  # type: ignore[arg-type]
        return TorchRunner(loaded)


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp on the CPU, which loads GGUF files: a model is exported first.

    Args:
        stored: the dtype of matrices in the file.
        threads: None: as many as torch takes.
    """

    stored: torch.dtype
    threads: int | None = None
    device = "cpu"

    @classmethod
    def from_options(cls, device: str, dtype: str, threads: int | None) -> LlamaCpp:
        """Return the engine that these options ask for; they may be `auto`.

        Raises:
            UserError: if its binding is not installed, or another device is asked for.
        """
        require_binding()
        if device not in (AUTO, cls.device):
            raise UserError(f"device {device}: llama.cpp is timed on the CPU; leave --device out")
        # The exporter's default, whatever the hardware: what people run.
        return cls(pick_dtype("float16" if dtype == AUTO else dtype, cls.device), threads)

    @property
    def dtype(self) -> str:
        """The dtype of the weights, by torch's name."""
        return dtype_name(self.stored)

    def prepare(self, model: str, place: Path, bars: Bars) -> Ready:
        """Export a model to a file at `place`; see `Transformers.prepare`."""
        from nuteprune.export.gguf.write import write_gguf  # what others do not need

        loaded, file = load_model(model, None), place.with_suffix(".gguf")
        written = write_gguf(
            loaded,
            load_tokenizer(model, remedy="leave --engine out, since transformers needs none"),
            file,
            type_name=GGUF_TYPES[self.stored],
            progress=lambda done, total: bars.update(f"exporting {model}", done, total),
        )
        work = replace(Work.of(loaded), bytes_per_parameter=self.stored.itemsize)
        positions = getattr(loaded.config, "max_position_embeddings", None)
        load = partial(LlamaCppRunner, str(file), work, positions, self.threads)
        return Ready(load, lambda: written.bytes)


Engine = Transformers | LlamaCpp
"""A program that runs models on a device in a dtype; `prepare` makes a model ready for it."""
ENGINES: dict[str, Callable[[str, str, int | None], Engine]] = {
    "transformers": Transformers.from_options,
    "llama.cpp": LlamaCpp.from_options,
}
"""Name -> what makes the engine of device, dtype and threads; the default first."""


def pick_engine(name: str, device: str, dtype: str, threads: int | None) -> Engine:
    """Return the engine that options name.

    Raises:
        UserError: if the engine is unknown, or cannot run here with these options.
    """
    if name not in ENGINES:
        raise UserError(f"--engine {name} is unknown; pass one of {', '.join(ENGINES)}")
    return ENGINES[name](device, dtype, threads)


def _on_disk(model: str) -> int | None:
    """Return the bytes of a model's weight files, None where they cannot be told."""
    folder = Path(locate(model))
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
            return None
    return weights_size(folder) or None
