"""Writes ONNX files, once ONNX Runtime has computed the same with them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nuteprune.errors import RunFailed, UserError
from nuteprune.export.onnx_graph import Exporter, check_rope
from nuteprune.files import check_room, data_files, partial_of, remove, sync, writing
from nuteprune.model.packed import refuse_packed

NEEDED = ("onnx", "onnxscript", "onnxruntime")
"""Packages of the extra `onnx`."""
LARGEST_ERROR = 1e-3
"""How far ONNX Runtime's logits may be off, relative to the largest: a wrong graph is off by more,
rounding by less (SmolLM2: 2e-6; badly cut: 3e-4, as are torch's two kinds of attention there)."""
LARGEST_FILE = 2**31 - 2**24
"""Bytes of weights up to which they are in the file itself: protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class WrittenOnnx:
    """The result of an export."""

    files: list[str]
    parameters: int
    bytes: int
    error: float
    """Largest deviation of ONNX Runtime's logits from torch's, relative to the largest logit."""


def require_packages() -> None:
    """Refuse to export without the extra `onnx`.

    Raises:
        UserError: naming what is missing.
    """
    if missing := [x for x in NEEDED if find_spec(x) is None]:
        raise UserError(
            f"an ONNX export needs {' and '.join(missing)}, not installed here; "
            "run: pip install 'nuteprune[onnx]'"
        )


def write_onnx(model: PreTrainedModel, path: Path) -> WrittenOnnx:
    """Write a model as an ONNX file, after ONNX Runtime has computed the same with it.

    Weights of 2 GB and more are in a second file, `NAME.*.data` beside it.

    Args:
        model: a causal LM of a supported family, pruned or not, in float32 on the CPU.
        path: the file; one that is there is replaced.

    Returns:
        What was written.

    Raises:
        UserError: if the extra `onnx` is not installed, the model is not in float32, or a graph
            cannot compute it.
        RunFailed: if ONNX Runtime computes something else, or writing went wrong on the way.
    """
    require_packages()
    refuse_packed(model)
    check_rope(model.config)
    if model.dtype != torch.float32:
        raise UserError(f"the model is in {model.dtype}; load it with dtype=torch.float32")
    exporter = Exporter(model)
    graph = exporter.graph()
    parameters = exporter.anatomy.parameters()
    data = f"{path.name}.{secrets.token_hex(4)}.data" if 4 * parameters > LARGEST_FILE else None
    partial = partial_of(path)
    with writing(path, "make room and do the same again"):
        try:
            remove(partial)  # what a killed export left
            partial.mkdir(parents=True)
            check_room(path, 4 * parameters)
            _save(graph, partial / path.name, data)
            error = exporter.error(partial / path.name)
            if not error <= LARGEST_ERROR:
                raise RunFailed(
                    f"ONNX Runtime's logits are off by {error:.1e} of the largest, more than "
                    f"{LARGEST_ERROR:g}; {path} was not written"
                )
            files = _move(partial, path, data)
        finally:
            remove(partial)
    size = sum(x.stat().st_size for x in files)
    return WrittenOnnx([x.name for x in files], parameters, size, error)


def _save(graph: Any, file: Path, data: str | None) -> None:
    import onnx_ir

    onnx_ir.save(graph, file, external_data=data)
    for written in file.parent.iterdir():
        sync(written)


def _move(partial: Path, path: Path, data: str | None) -> list[Path]:
    """Move a finished file into place, weights first: an old graph stays valid until then."""
    moved = []
    for name in filter(None, (data, path.name)):
        (partial / name).replace(path.with_name(name))
        moved.append(path.with_name(name))
    sync(path.parent)
    for old in set(data_files(path)) - set(moved):
        old.unlink()
    return moved[::-1]
