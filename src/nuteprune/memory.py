"""Memory of this process: its peak, what is freed, and tensors that move to a file."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nuteprune.files import writing
from nuteprune.run_folder import HALF_WRITTEN
from nuteprune.simulated import has_data, left

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Reset the peak, if the system can."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # not Linux, or /proc may only be read
        _RESET.write_text("5")


def give_back() -> None:
    """Return freed memory, which the C library would keep, to the system.

    It costs milliseconds, so it is called between layers, not between operations.
    """
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def peak() -> int:
    """Return the peak in bytes: allocated on the accelerator where one is used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss where there is a choice: a child process inherits its parent's.
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def mapped(part: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Move tensors from main memory to an unnamed file, and return them as read from there.

    The system drops what is not in use, and reads it again. The file's room is given back when
    nobody holds the tensors.

    Args:
        part: tensors by name; tensors on an accelerator stay where they are.
        folder: where there is room; made if it is not there.

    Raises:
        UserError: if nothing can be written there.
        RunFailed: if writing went wrong on the way, as where the disk is full.
    """
    if not all(map(has_data, part.values())):
        return {name: left(x) for name, x in part.items()}
    if any(x.device.type != "cpu" for x in part.values()):
        return part
    with writing(folder, "make room, then go on with --resume"):
        folder.mkdir(parents=True, exist_ok=True)
        # Some systems keep a file's name while it is in use.
        with TemporaryDirectory(None, HALF_WRITTEN, folder, ignore_cleanup_errors=True) as place:
            path = Path(place) / "part.safetensors"
            save_file({name: x.contiguous() for name, x in part.items()}, path)
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in part}
