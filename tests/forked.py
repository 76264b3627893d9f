"""Python processes that need no time to start: forks of a server that has imported the libraries.

`python("-m", "nuteprune.cli", ...)` does what `subprocess.run([sys.executable, "-m", ...])` does,
in a tenth of the time. The process is a real one: it has arguments, an environment, signals, an
exit code, and no module of ours until it imports one. What it cannot show is how an interpreter
starts and what the libraries read from the environment while they are imported; a test of that
starts an interpreter.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

LIBRARIES = [
    *("torch.distributed.tensor", "torch.distributed.fsdp", "transformers.trainer", "peft"),
    *("transformers.models.llama.modeling_llama", "datasets", "gguf", "typer", "rich.progress"),
    *("matplotlib.pyplot", "pytest"),
]
"""What the server imports; nothing of ours."""
OUTPUTS = ("out", "err")


def server() -> ForkServerContext:
    """Return the context whose processes are forks of the server, which starts on first use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def workers() -> SimpleNamespace:
    """Return a context for `judge.worker`: the server's, with this process's environment.

    The server has that of the test that it was started by, and so have its forks.
    """

    def process(target: Any, args: tuple[Any, ...], daemon: bool) -> Any:
        words = (dict(os.environ), target, args)
        return server().Process(target=_within, args=words, daemon=daemon)

    return SimpleNamespace(Pipe=server().Pipe, Process=process)


def _within(environment: dict[str, str], target: Any, args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (negative: by a signal) and what it printed."""

    code: int
    out: str
    err: str


class Forked:
    """A Python process that has begun.

    Args:
        arguments: what would follow `python`: a script or `-m` and a module, and their arguments.
        folder: where the files `out` and `err` get what it prints.
        environment: variables that it has besides those of this process.
    """

    def __init__(self, arguments: Sequence[object], folder: Path, **environment: str) -> None:
        self.folder = folder
        for name in OUTPUTS:
            (folder / name).touch()
        words, variables = [str(x) for x in arguments], os.environ | environment
        self.process = server().Process(target=_become, args=(words, str(folder), dict(variables)))
        self.process.start()

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def running(self) -> bool:
        """Return whether it has not ended yet."""
        return self.process.is_alive()

    def wait(self, seconds: float = 300) -> Ended:
        """Return how it ended; kills it after so many seconds."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        self.process.close()
        assert code is not None
        texts = [(self.folder / name).read_text(errors="replace") for name in OUTPUTS]
        return Ended(code, *texts)


def piped(parts: Sequence[str], **_: Any) -> SimpleNamespace:
    """Stand in for `subprocess.Popen` where it starts Python with pipes of text.

    Args:
        parts: the interpreter, which is not started, and what follows.
    """
    their_in, our_out = server().Pipe(duplex=False)
    our_in, their_out = server().Pipe(duplex=False)
    theirs = (their_in, their_out, Connection(os.dup(2)))
    process = server().Process(target=_talk, args=(theirs, list(parts[1:]), dict(os.environ)))
    process.start()
    for end in theirs:
        end.close()

    def wait() -> int | None:
        process.join()
        return process.exitcode

    writing, reading = (
        os.fdopen(os.dup(x.fileno()), y) for x, y in ((our_out, "w"), (our_in, "r"))
    )
    our_out.close()
    our_in.close()
    return SimpleNamespace(stdin=writing, stdout=reading, wait=wait)


def python(*arguments: object, processes: int | None = None, **environment: str) -> Ended:
    """Run Python to its end.

    Args:
        arguments: what would follow `python`.
        processes: how many, joined as those of torchrun are; None: one that nobody launched.
        environment: variables besides those of this process.

    Returns:
        The first exit code that is not 0, and all that was printed.
    """
    with TemporaryDirectory() as name:
        places = [{}] if processes is None else ranks(processes)
        started = []
        for number, place in enumerate(places):
            (folder := Path(name) / str(number)).mkdir()
            started.append(Forked(arguments, folder, **place, **environment))
        ended = [process.wait() for process in started]
    code = next((x.code for x in ended if x.code), 0)
    return Ended(code, "".join(x.out for x in ended), "".join(x.err for x in ended))


def ranks(count: int) -> list[dict[str, str]]:
    """Return what torchrun tells each of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]


def _talk(ends: Sequence[Connection], words: list[str], environment: dict[str, str]) -> None:
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
    sys.stdin = os.fdopen(0, closefd=False)
    _do(words, environment)


def _become(words: list[str], folder: str, environment: dict[str, str]) -> None:
    for number, name in enumerate(OUTPUTS, start=1):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY), number)
    _do(words, environment)


def _do(words: list[str], environment: dict[str, str]) -> None:
    """Do in this process what `python` would do with these words."""
    os.environ.clear()
    os.environ.update(environment)
    os.fsync = lambda _: None  # as of `disks_are_not_waited_for`
    import torch

    gc.freeze()  # the libraries are no garbage, which Trainer would look for in them
    torch.set_num_threads(1)
    how, *rest = words
    if how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = [how, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(how, run_name="__main__")
