"""A run in less memory than its model's weights take: a memory cgroup of Linux is the judge.

    python benchmarks/little_memory.py --size 3b --json benchmarks/results/little-memory.json
    python benchmarks/little_memory.py --size 2b --processes 4 --limit 2.6e9 --only-limited

A LLaMA of random weights is scored, refitted, trained for two steps, cut and written, twice: free,
where the peak of each phase's anonymous memory is measured, and within a limit, where nobody looks.
What is written has to be the same, byte for byte. The limit is of all memory: the process, its
libraries, and what it has read of files, which the system may drop and read again. It needs root.

With `--processes` the weights are sharded over several (gloo, one thread each), and the limit is
that of each. What a process frees goes back to the system at once there: else the C library keeps
holes where gathered layers were. `--only-limited` leaves the first run out, and looks at the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from plan import Cell, Unwatched, Watch, measured


@dataclass(frozen=True)
class Size:
    """A model, and the memory that a run on it is to do with.

    Args:
        shape: of its config.
        limit: bytes.
        length: tokens per block.
    """

    shape: dict[str, int]
    limit: float
    length: int = 128


SIZES = {
    "300m": Size(
        {
            "hidden_size": 1024,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "intermediate_size": 2048,
            "vocab_size": 1000,
        },
        0.8e9,
        32,
    ),
    "1b": Size(
        {
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "intermediate_size": 4096,
            "vocab_size": 32000,
        },
        1.4e9,
    ),
    "2b": Size(
        {
            "hidden_size": 2048,
            "num_hidden_layers": 80,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "intermediate_size": 2048,
            "vocab_size": 1000,
        },
        1.4e9,
        32,
    ),
    "3b": Size(
        {
            "hidden_size": 3072,
            "num_hidden_layers": 64,
            "num_attention_heads": 16,
            "head_dim": 128,
            "num_key_value_heads": 4,
            "intermediate_size": 3072,
            "vocab_size": 32000,
        },
        3.0e9,
        32,
    ),
    "llama-3b": Size(
        {
            "hidden_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 32000,
        },
        3.0e9,
    ),
}
"""llama-3b has the shapes of Llama 3.2, with a smaller vocabulary. The others are deeper and
narrower: inverses grow with the cube of a layer's neurons, and take most of a run here."""
SETTINGS: dict[str, Any] = {
    "calibration_blocks": 2,
    "per_device_train_batch_size": 1,
    "lora_rank": 8,
}
TOO_MUCH = "x = bytearray(4 * 10**9); print(len(x))"


class Cgroup:
    """A memory cgroup of Linux, version 1 or 2.

    Args:
        limit: bytes, swap included.
        number: which of this process's it is.

    Raises:
        OSError: where none can be made.
    """

    def __init__(self, limit: float, number: int = 0) -> None:
        root, files = Path("/sys/fs/cgroup"), ("memory.max", "memory.swap.max")
        self._peak, second = "memory.peak", "0"
        if not (root / "cgroup.controllers").exists():
            root = root / "memory"
            files = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
            self._peak, second = "memory.max_usage_in_bytes", str(int(limit))
        self.folder = root / f"nuteprune-{os.getpid()}-{number}"
        self.folder.mkdir()
        for file, value in zip(files, (str(int(limit)), second), strict=True):
            if (self.folder / file).exists():
                (self.folder / file).write_text(value)

    def enter(self) -> None:
        """Put the calling process into it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak(self) -> int:
        """The most that was ever held in it, in bytes, files among it; 0 if the system is old."""
        path = self.folder / self._peak
        return int(path.read_text()) if path.exists() else 0


@contextmanager
def limited(limit: float, number: int = 0) -> Iterator[Cgroup]:
    """Make a cgroup that kills a process that takes too much.

    Raises:
        OSError: where none can be made, or it does not kill.
    """
    made = Cgroup(limit, number)
    try:
        code = subprocess.run([sys.executable, "-c", TOO_MUCH], preexec_fn=made.enter).returncode
        if code != -signal.SIGKILL:
            raise OSError(f"a process that allocates 4 GB in it is not killed: it ends with {code}")
        yield made
    finally:
        made.folder.rmdir()


def write_model(size: Size, folder: Path) -> int:
    """Write a model of random weights in bfloat16 and return their bytes."""
    from transformers import AutoConfig

    from nuteprune.plan.walk import model_of

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"], **size.shape)
    model = model_of(config, torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def evict(folder: Path) -> None:
    """Drop files from memory, so that what reads them next has to answer for them."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Done:
    """A run.

    Args:
        code: with which it ended; of several processes the first that is not 0.
        seconds: that it took.
        peaks: phase -> bytes, where somebody looked; of several processes the most.
        sums: file of weights -> SHA-256.
    """

    code: int
    seconds: float
    peaks: dict[str, int]
    sums: dict[str, str]


def ranks(count: int) -> list[dict[str, str]]:
    """Return the environment of each process; nothing where there is one."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    shared |= {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]


def done(
    size: Size, model: Path, out: Path, enters: Sequence[Callable[[], None] | None], look: bool
) -> Done:
    """Do a run in a process of its own, or in several."""
    shared = {"sharded": True, "calibration_blocks": len(enters)} if len(enters) > 1 else {}
    cell = asdict(Cell("little", str(model), "bfloat16", size.length, SETTINGS | shared))
    words = [sys.executable, __file__, "--one", json.dumps([cell, str(out), look])]
    begun = time.monotonic()
    started = [
        subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, preexec_fn=enter, env={**os.environ, **rank}
        )
        for enter, rank in zip(enters, ranks(len(enters)), strict=True)
    ]
    told = [process.communicate()[0] for process in started]
    seconds = time.monotonic() - begun
    code = next((x.returncode for x in started if x.returncode), 0)
    files = sorted((out / "small").glob("*.safetensors"))
    sums = {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in files}
    found = [json.loads(text.splitlines()[-1]) for text in told] if code == 0 else [{}]
    peaks = {phase: max(x[phase] for x in found) for phase in found[0]}
    return Done(code, seconds, peaks, sums)


def compared(
    size: Size, limit: float, scratch: Path, processes: int = 1, only_limited: bool = False
) -> dict[str, Any]:
    """Do a run without and with a limit, print how they went, and return it."""
    weights = write_model(size, scratch / "model")
    print(f"weights {weights / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB", flush=True)
    free = Done(0, 0.0, {}, {})
    if not only_limited:
        free = done(size, scratch / "model", scratch / "free", [None] * processes, look=True)
    evict(scratch / "model")
    with ExitStack() as stack:
        cgroups = [stack.enter_context(limited(limit, i)) for i in range(processes)]
        bound = done(
            size, scratch / "model", scratch / "bound", [x.enter for x in cgroups], only_limited
        )
        most = max(x.peak for x in cgroups)
    peaks = (bound if only_limited else free).peaks
    for phase, peak in peaks.items():
        print(f"{phase:28}{peak / 1e6:8.0f} MB", flush=True)
    same = None if only_limited else free.sums == bound.sums and bool(free.sums)
    print(f"free {free.seconds:.0f} s; limited {bound.seconds:.0f} s, exit code {bound.code}")
    print(f"most in the cgroup {most / 1e9:.2f} GB; the same bytes: {same}")
    return {
        **asdict(size),
        "settings": SETTINGS,
        "processes": processes,
        "limit": limit,
        "weights": weights,
        "phases": peaks,
        "free_seconds": free.seconds,
        "limited_seconds": bound.seconds,
        "limited_code": bound.code,
        "limited_peak": most,
        "same": same,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Do both runs and return what `--json` writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="3b")
    parser.add_argument("--limit", type=float, help="bytes, in place of the size's own")
    parser.add_argument("--processes", type=int, default=1, help="that share the weights out")
    parser.add_argument("--only-limited", action="store_true", help="no run without a limit")
    parser.add_argument("--folder", help="where there is room for the model and two results")
    parser.add_argument("--json", metavar="FILE", help="where to write all figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        cell, out, look = json.loads(args.one)
        watching = Watch if look else Unwatched
        print(json.dumps(measured(Cell(**cell), cell["model"], out, watching)))
        return {}
    size = SIZES[args.size]
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        limit = args.limit or size.limit
        result = compared(size, limit, Path(scratch), args.processes, args.only_limited)
    if args.json:  # which keeps what it has of other sizes
        file = Path(args.json)
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        name = args.size if args.processes == 1 else f"{args.size}, {args.processes} processes"
        file.write_text(json.dumps({**earlier, name: result}) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
