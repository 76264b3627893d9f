"""Runs commands of nuteprune in forked children, with faults on order; started by conftest.py.

Everything is imported once, in a parent with one thread, and each run is a child of it: seconds
become fractions of a second. A request is a line of JSON on stdin:

- args: the command line.
- folder: where it runs; null: here.
- log, events: files for what it prints and for its events; without a file it has no events.
- root: files whose path begins so are the run's own.
- fault: what goes wrong, see `Faults`, and in which process (`rank`); null: nothing.
- demo: fields of the demo's model, and variables, to use instead; null: the real ones.
- processes: how many, joined as those of torchrun are; null: one that nobody launched.

The answer is an exit code, negative for a signal, and the seconds of CPU that it took. A command
that takes too long ends by a signal of `HANGS`.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import errno
import functools
import gc
import importlib
import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MODULES = ("nuteprune.cli.app", "nuteprune.cli.commands")
LAZY = ("transformers.models.llama.modeling_llama", "transformers.trainer", "datasets", "pyarrow")
PHASES = {
    "nuteprune.stages.score:score": "scoring",
    "nuteprune.stages.choose:choose": "choosing",
    "nuteprune.stages.refit:refit": "refitting",
    "nuteprune.products:Products._write": "keeping a product",
    "nuteprune.train.distiller:Distiller.training_step": "stepping",
    "nuteprune.progressive.trainer:ProgressiveTrainer.end_step": "ending a step",
    "nuteprune.progressive.trainer:ProgressiveTrainer.freeze": "freezing",
    "nuteprune.train.checkpoints:AtomicTrainer._load_from_checkpoint": "resuming",
    "nuteprune.progressive.teachers:Teachers.record": "recording a teacher",
    "nuteprune.train.checkpoints:AtomicTrainer._save_checkpoint": "writing a checkpoint",
    "nuteprune.train.trainer:NutePruneTrainer.finalize": "finalizing",
    "nuteprune.train.trainer:NutePruneTrainer.cut_copy": "cutting a copy",
    "nuteprune.shrink.slicing:cut_part": "slicing",
    "nuteprune.export.loading:build": "building",
    "nuteprune.export.checkpoint:save": "exporting",
    "nuteprune.stages.save:save": "writing the record",
    "nuteprune.judge.report:write_report": "reporting",
    "nuteprune.export.gguf.write:write_gguf": "writing GGUF",
    "nuteprune.jobs.folder:clear": "clearing",
    "nuteprune.jobs.folder:clear_result": "clearing a result",
    "nuteprune.data.demo:fetch": "downloading",
    "nuteprune.data.demo:_convert": "converting",
    "nuteprune.judge.perplexity:perplexities": "measuring",
    "nuteprune.stages.judge:judge_beside": "judging answers",
    "nuteprune.stages.write:write": "writing text",
    "nuteprune.train.recover:RecoverTrainer.merge": "merging",
    "nuteprune.jobs.fewer_tokens:read_text": "counting tokens",
    "nuteprune.export.vocabulary:cut_model": "cutting the vocabulary",
    "nuteprune.judge.block_times:cost_table": "timing blocks",
    "nuteprune.jobs.timing:measure": "timing models",
    "nuteprune.jobs.family:run": "proposing",
}
"""Functions that are events at their beginning and end -> what events inside them are part of."""

CPU_SECONDS, SECONDS = 120, 1200
"""After so long a command hangs. A machine may be busy, or the whole test be paused."""
HANGS = (-signal.SIGXCPU, -signal.SIGALRM)
MEMORY = 2**33
"""Bytes that a command may map besides what is mapped already."""


def owner_of(place: str) -> tuple[Any, str]:
    """Return the module or class that holds a function of `PHASES`, and the function's name."""
    module_name, _, path = place.partition(":")
    *outer, name = path.split(".")
    return functools.reduce(getattr, outer, importlib.import_module(module_name)), name


class Faults:
    """Counts events once a run begins, and does harm at one of them.

    An event is a call of a function of `PHASES`, or a file being opened, half written, synced,
    renamed or removed. Each one's phase and name go to a file.
    """

    def __init__(self) -> None:
        self.root, self.log = "\0", -1
        self.fault: dict[str, Any] = {"at": None}
        self.phases, self.count, self.full = ["starting"], 0, False
        self.synced: dict[str, int] = {}  # of each file that is written: bytes on the disk for sure
        for place, phase in PHASES.items():  # once, before any fork: it takes its time
            self.wrap(place, phase)
        self.file_calls()
        self.opening()
        self.saving()

    def begin(self, root: str, log: str, fault: dict[str, Any] | None) -> None:
        """Count from here.

        Args:
            root: how paths of the run's own files begin.
            log: the file.
            fault: `how` it goes wrong, and the number of the event `at` which it does:

                - kill: the process ends at once (SIGKILL).
                - term: it is asked to end (SIGTERM).
                - power: the machine ends: of each file that was not synced half is lost.
                - full: the disk is full from then on.
        """
        self.root, self.fault = root, fault or self.fault
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def event(self, name: str) -> bool:
        """Count an event, do harm if it was ordered here; returns whether the disk is full."""
        if self.log < 0:
            return False
        os.write(self.log, f"{self.phases[-1]}\t{name}\n".encode())
        here = self.fault["at"] == self.count
        self.count += 1
        if here:
            self.harm(self.fault["how"])
        return self.full

    def harm(self, how: str) -> None:
        if how == "term":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.full = how == "full"
        if how == "power":
            for path in filter(os.path.isfile, self.synced):
                size, sure = os.path.getsize(path), self.synced[path]
                if size > sure:
                    os.truncate(path, (size + sure) // 2)
        if not self.full:
            os.kill(os.getpid(), signal.SIGKILL)

    def ours(self, path: Any) -> bool:
        """Return whether a path is one that the run writes to."""
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self.root)

    def wrap(self, place: str, phase: str) -> None:
        """Make a function's beginning and end events."""
        owner, name = owner_of(place)
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.phases.append(phase)
            self.event("begins")
            try:
                result = original(*args, **kwargs)
                self.event("ends")
                return result
            finally:
                self.phases.pop()

        replace_everywhere(original, watched, owner, name)

    def file_calls(self) -> None:
        """Make renaming, removing, making and syncing of the run's files events."""
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            original = getattr(os, name)

            def called(path: Any, *args: Any, _name: str, _original: Any, **kwargs: Any) -> Any:
                # rmtree names files relative to a descriptor of their folder.
                if self.ours(path) or kwargs.get("dir_fd") is not None:
                    self.event(f"{_name} {os.path.basename(path)}")
                result = _original(path, *args, **kwargs)
                if _name in ("replace", "rename") and str(path) in self.synced:
                    self.synced[str(args[0])] = self.synced.pop(str(path))
                return result

            setattr(os, name, functools.partial(called, _name=name, _original=original))
        sync = os.fsync

        def synced(descriptor: int) -> None:
            self.event("fsync")
            sync(descriptor)
            if (path := os.path.realpath(f"/proc/self/fd/{descriptor}")) in self.synced:
                self.synced[path] = os.path.getsize(path)

        os.fsync = synced

    def opening(self) -> None:
        """Make opening and writing of the run's files events; half of a write may be all."""
        original = io.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not (set(mode) & set("wax+") and self.ours(file)):
                return original(file, mode, *args, **kwargs)
            if self.event(f"open {os.path.basename(file)}"):
                raise no_space(file)
            handle = original(file, mode, *args, **kwargs)
            path = os.path.realpath(file)
            new = set(mode) & set("wx")
            self.synced[path] = 0 if new else self.synced.get(path, os.path.getsize(path))
            write = handle.write

            def half(data: Any) -> Any:
                write(data[: len(data) // 2])
                handle.flush()
                if self.event(f"half of {os.path.basename(file)}"):
                    raise no_space(file)
                return write(data[len(data) // 2 :])

            try:
                handle.write = half
            except AttributeError:  # binary files take no attributes
                return Binary(handle, half)
            return handle

        builtins.open = io.open = opened

    def saving(self) -> None:
        """Make saving of tensors events; files may be cut in the middle."""
        import safetensors.torch
        import torch
        from safetensors import SafetensorError

        def half_written(
            save: Callable[..., Any], full: Callable[[Any], Exception], at: int
        ) -> Any:
            @functools.wraps(save)
            def saved(*args: Any, **kwargs: Any) -> Any:
                path = args[at] if len(args) > at else kwargs["filename"]
                if not self.ours(path):
                    return save(*args, **kwargs)
                name = os.path.basename(path)
                self.event(f"save {name}")
                result = save(*args, **kwargs)
                self.synced[os.path.realpath(path)] = 0
                whole = Path(path).read_bytes()
                os.truncate(path, len(whole) // 2)
                if self.event(f"half of {name}"):
                    raise full(path)
                with open_quietly(path) as file:
                    file.write(whole)
                self.event(f"saved {name}")
                return result

            return saved

        open_quietly = functools.partial(_open, mode="wb")
        full_disk = SafetensorError("I/O error: No space left on device (os error 28)")
        tensors = half_written(safetensors.torch.save_file, lambda path: full_disk, 1)
        replace_everywhere(safetensors.torch.save_file, tensors, safetensors.torch, "save_file")
        torch.save = half_written(
            torch.save,
            lambda path: RuntimeError("PytorchStreamWriter failed writing file data/0"),
            1,
        )


class Binary:
    """A binary file whose writes are watched."""

    def __init__(self, handle: Any, write: Callable[[Any], Any]) -> None:
        self._handle, self.write = handle, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> Binary:
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.close()


_open = io.open


def no_space(path: Any) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def replace_everywhere(original: Any, new: Any, owner: Any, name: str) -> None:
    """Put a function in place of another, wherever a module of ours or transformers' knows it."""
    setattr(owner, name, new)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("nuteprune", "transformers.modeling_utils")):
            for key, value in list(vars(module).items()):
                if value is original:
                    setattr(module, key, new)


def child(faults: Faults, request: dict[str, Any], rank: int) -> None:
    """Run a command with its faults; never returns."""
    os.setpgid(0, 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | (os.O_APPEND if rank else os.O_TRUNC))
    for stream in (1, 2):
        os.dup2(log, stream)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from nuteprune.cli.app import main
    from nuteprune.data import demo as assets

    if request["folder"]:
        os.chdir(request["folder"])
    os.environ.update(request["environ"])
    if request["demo"]:
        assets.MODEL = dataclasses.replace(assets.MODEL, **request["demo"]["model"])
        text = dataclasses.replace(assets.TEXTS["speeches"], **request["demo"]["text"])
        assets.TEXTS = {"speeches": text}
        os.environ.update(request["demo"]["environ"])
    fault = request["fault"] if (request["fault"] or {}).get("rank", 0) == rank else None
    if fault and "after" in fault:  # seconds of CPU, at whatever it is then
        signal.setitimer(signal.ITIMER_PROF, fault["after"])
        fault = None
    if request["events"]:
        faults.begin(request["root"], f"{request['events']}{rank or ''}", fault)
    sys.argv = ["nuteprune", *request["args"]]
    try:
        main()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(stop.code or 0))
    os._exit(70)


def ranks(count: int | None) -> list[dict[str, str]]:
    """Return what torchrun would tell each of the processes."""
    if count is None:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]


def answer(faults: Faults, request: dict[str, Any]) -> str:
    """Run a command in its processes: the first that fails takes the others with it."""
    pids = []
    for rank, told in enumerate(ranks(request["processes"])):
        pid = os.fork()
        if pid == 0:
            child(faults, {**request, "environ": told}, rank)
        pids.append(pid)
    code, seconds, left = 0, 0.0, set(pids)
    while left:
        pid, status, used = os.wait3(0)
        left.discard(pid)
        seconds += used.ru_utime + used.ru_stime
        ended = os.waitstatus_to_exitcode(status)
        if ended and not code:
            code = ended
            if left:  # it may still write before it is noticed
                time.sleep(0.3)
        for other in left if code else ():
            os.kill(other, signal.SIGKILL)
    for pid in pids:  # what they have started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return f"{code} {seconds:.3f}"


def serve() -> None:
    """Answer requests until stdin ends."""
    from nuteprune.cli.app import quiet_libraries
    from nuteprune.judge import worker
    from tests.undrawn import leave_blank
    from tests.unplanned import leave_unplanned

    quiet_libraries()
    for name in (*MODULES, *LAZY):
        importlib.import_module(name)
    for place in PHASES:
        importlib.import_module(place.partition(":")[0])
    leave_blank()
    leave_unplanned(setattr)
    worker.multiprocessing = SimpleNamespace(  # type: ignore[attr-defined]
        get_context=lambda _: multiprocessing.get_context("fork")
    )
    faults = Faults()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        print(answer(faults, json.loads(line)), flush=True)


if __name__ == "__main__":
    serve()
