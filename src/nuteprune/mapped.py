"""Tensors in an unnamed file, read from there as they are used."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nuteprune.files import writing
from nuteprune.run_folder import HALF_WRITTEN
from nuteprune.simulated import has_data, left


def mapped(part: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Move tensors from main memory to a file, and return them as they are read from there.

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
