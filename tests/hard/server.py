"""Runs commands of nuteprune in forked children, with faults on order; started by conftest.py.

Everything is imported once, in a parent with one thread, and each run is a child of it: seconds
become fractions of a second. A request is a line of JSON on stdin, `{"args": [...], "log": path,
"events": path, "fault": null or {"at": k, "how": "kill" or "full"}, "demo": null or fields of
the demo's model to use instead}`; the answer is the child's exit code, negative for a signal.

A child counts events: a call of a function in `WATCHED`, a file being opened, half written,
synced, renamed or removed. It writes each one's name to the file `events`, and at the k-th
one it kills itself (`kill`) or finds the disk full from then on (`full`).
"""

from __future__ import annotations

import builtins
import dataclasses
import errno
import functools
import gc
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULES = ("nuteprune.cli.app", "nuteprune.cli.demo", "nuteprune.cli.prune", "nuteprune.cli.report")
LAZY = ("transformers.models.llama.modeling_llama", "transformers.trainer", "datasets", "pyarrow")
PHASES = {
    "nuteprune.stages.score:score": "scoring",
    "nuteprune.stages.price:price": "pricing",
    "nuteprune.stages.choose:choose": "choosing",
    "nuteprune.stages.refit:refit": "refitting",
    "nuteprune.products:Products._write": "keeping a product",
    "nuteprune.train.trainer:NutePruneTrainer.training_step": "stepping",
    "nuteprune.progressive.trainer:ProgressiveTrainer.end_step": "ending a step",
    "nuteprune.progressive.trainer:ProgressiveTrainer.freeze": "freezing",
    "nuteprune.train.checkpoints:AtomicTrainer._load_from_checkpoint": "resuming",
    "nuteprune.progressive.teachers:Teachers.record": "recording a teacher",
    "nuteprune.train.checkpoints:AtomicTrainer._save_checkpoint": "writing a checkpoint",
    "nuteprune.train.trainer:NutePruneTrainer.finalize": "finalizing",
    "nuteprune.train.trainer:NutePruneTrainer.cut_copy": "cutting a copy",
    "nuteprune.shrink.slicing:cut_state": "slicing",
    "nuteprune.export.loading:build": "building",
    "nuteprune.export.checkpoint:save": "exporting",
    "nuteprune.export.record:write_pruned": "writing the record",
    "nuteprune.judge.report:write_report": "reporting",
    "nuteprune.export.gguf.write:write_gguf": "writing GGUF",
    "nuteprune.jobs.folder:clear": "clearing",
    "nuteprune.jobs.folder:clear_result": "clearing a result",
    "nuteprune.data.demo:fetch": "downloading",
    "nuteprune.data.demo:_convert": "converting",
    "nuteprune.judge.perplexity:perplexities": "measuring",
}
"""Functions that are events at their beginning and end -> what events inside them are part of."""


def owner_of(place: str) -> tuple[Any, str]:
    """Return the module or class that holds a function of `PHASES`, and the function's name."""
    module_name, _, path = place.partition(":")
    *outer, name = path.split(".")
    return functools.reduce(getattr, outer, importlib.import_module(module_name)), name


class Faults:
    """Counts events, and does harm at one of them."""

    def __init__(self, root: str, log: str, fault: dict[str, Any] | None) -> None:
        self.root, self.fault = root, fault
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.phases, self.count, self.full = ["starting"], 0, False

    def event(self, name: str) -> bool:
        """Count an event; dies at the one that was ordered, or says that the disk is full now."""
        os.write(self.log, f"{self.phases[-1]}\t{name}\n".encode())
        here = self.fault is not None and self.fault["at"] == self.count
        self.count += 1
        if here and self.fault["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.full = self.full or here
        return self.full

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
                return _original(path, *args, **kwargs)

            setattr(os, name, functools.partial(called, _name=name, _original=original))
        sync = os.fsync

        def synced(descriptor: int) -> None:
            self.event("fsync")
            sync(descriptor)

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


def child(request: dict[str, Any]) -> None:
    """Run a command with its faults; never returns."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    from nuteprune.cli.app import main
    from nuteprune.data import demo as assets

    if request["demo"]:
        assets.MODEL = dataclasses.replace(assets.MODEL, **request["demo"]["asset"])
        os.environ.update(request["demo"]["environ"])
    if request["events"]:
        faults = Faults(request["root"], request["events"], request["fault"])
        for place, phase in PHASES.items():
            faults.wrap(place, phase)
        faults.file_calls()
        faults.opening()
        faults.saving()
    sys.argv = ["nuteprune", *request["args"]]
    try:
        main()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(stop.code or 0))
    os._exit(70)


def serve() -> None:
    """Answer requests until stdin ends."""
    from nuteprune.cli.app import quiet_libraries

    quiet_libraries()
    for name in (*MODULES, *LAZY):
        importlib.import_module(name)
    for place in PHASES:
        importlib.import_module(place.partition(":")[0])
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
