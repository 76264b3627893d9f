"""A model in its own process: its memory is its own, and passes can take turns."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import PreTrainedModel

from nuteprune import memory
from nuteprune.errors import RunFailed, UserError
from nuteprune.judge.bench import Setting, Timing, Work, time_once
from nuteprune.model.anatomy import Anatomy


@dataclasses.dataclass(frozen=True)
class About:
    """What a worker's model is, and what it runs on."""

    work: Work
    positions: int | None
    attention: str
    threads: int
    hardware: str


class Worker:
    """Holds a model in another process, and times it when it is told to.

    Args:
        name: what the model is called in messages.
        load: makes the model, on its device; it is sent to the process, so it must be picklable.
        threads: threads for its operations; None: as many as the libraries take by themselves.

    Raises:
        UserError: if the model cannot be loaded.
        RunFailed: if the process breaks down, then or later.
    """

    def __init__(
        self, name: str, load: Callable[[], PreTrainedModel], threads: int | None = None
    ) -> None:
        self.name = name
        spawn = multiprocessing.get_context("spawn")  # a forked one could not use CUDA
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, load, threads), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.about: About = self._answer()
        except BaseException:
            self.close()
            raise

    def time(self, setting: Setting) -> Timing:
        """Time one pass."""
        self._pipe.send(setting)
        timing: Timing = self._answer()
        return timing

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RunFailed(
                f"the process that measured {self.name} ended with code {self._process.exitcode}; "
                "perhaps memory ran out: pass smaller --batch-sizes or --lengths"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, load: Callable[[], PreTrainedModel], threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends this process itself
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        model = load()
        pipe.send(_about(model))
        while True:
            pipe.send(_timed(model, pipe.recv()))
    except EOFError:
        return
    except UserError as error:
        pipe.send(error)
    except Exception as error:
        pipe.send(RunFailed(f"{type(error).__name__}: {error}"))


def _about(model: PreTrainedModel) -> About:
    cuda = model.device.type == "cuda"
    return About(
        Work.of(model),
        getattr(model.config, "max_position_embeddings", None),
        str(model.config._attn_implementation),
        torch.get_num_threads(),
        torch.cuda.get_device_name(model.device) if cuda else "CPU",
    )


def _timed(model: PreTrainedModel, setting: Setting) -> Timing:
    random = torch.Generator().manual_seed(0)
    size = (setting.batch_size, setting.length)
    prompt_BT = torch.randint(_vocabulary(model), size, generator=random).to(model.device)
    memory.reset_peak()
    timing = time_once(model, prompt_BT, setting.new_tokens)
    return dataclasses.replace(timing, peak_memory=memory.peak())


def _vocabulary(model: PreTrainedModel) -> int:
    return int(Anatomy(model).embedding.weight.shape[0])
