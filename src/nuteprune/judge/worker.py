"""A model that is timed, in its own process: its memory is its own, and passes can take turns."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from nuteprune import memory
from nuteprune.errors import RunFailed, UserError
from nuteprune.judge.bench import Timing, hardware_of, time_once
from nuteprune.judge.work import Work, Workload


@dataclasses.dataclass(frozen=True)
class About:
    """Facts of a loaded model, and of what it runs on.

    Args:
        work: what it has to move and multiply.
        attention: transformers' name of its implementation.
        threads: of a CPU.
        hardware: the accelerator's name, or `CPU`.
    """

    work: Work
    attention: str
    threads: int
    hardware: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> About:
        """Look at a model, on its device."""
        return cls(
            Work.of(model),
            str(model.config._attn_implementation),
            torch.get_num_threads(),
            hardware_of(model.device),
        )


class Worker(AbstractContextManager["Worker"]):
    """Holds a model in another process, which loads it meanwhile, and times it when it is told to.

    Args:
        name: what the model is called in messages.
        load: loads the model onto its device; it is sent to the process, so it must be picklable.

    Raises:
        UserError: if the model cannot be loaded, when `about` or a time is asked for.
        RunFailed: if the process breaks down.
    """

    def __init__(self, name: str, load: Callable[[], PreTrainedModel]) -> None:
        self.name = name
        spawn = multiprocessing.get_context("spawn")  # a forked one could not use CUDA
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, load), daemon=True)
        with _nothing_of_main():
            self._process.start()
        theirs.close()

    @cached_property
    def about(self) -> About:
        """What is loaded, once it is."""
        about: About = self._answer()
        return about

    def time(self, setting: Workload) -> Timing:
        """Time one pass."""
        _ = self.about  # the first answer
        with suppress(BrokenPipeError):  # it has ended; why, is told where its answer is missing
            self._pipe.send(setting)
        timing: Timing = self._answer()
        return timing

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RunFailed(
                f"the process that measured {self.name} ended with code {self._process.exitcode}; "
                "perhaps memory ran out: ask for smaller batches or fewer tokens"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


@contextmanager
def _nothing_of_main() -> Iterator[None]:
    """Keep a process spawned in this context from running the program's main module.

    A script without `if __name__ == "__main__"` would do its work again there.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(pipe: Connection, load: Callable[[], PreTrainedModel]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends this process itself
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        model = load()
        pipe.send(About.of(model))
        while True:
            setting = pipe.recv()
            memory.reset_peak()
            timing = time_once(model, setting)
            pipe.send(dataclasses.replace(timing, peak_memory=memory.peak()))
    except EOFError:
        return
    except (UserError, RunFailed) as error:
        pipe.send(error)
    except Exception as error:
        pipe.send(RunFailed(f"{type(error).__name__}: {error}"))
