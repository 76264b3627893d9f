"""The job of `export`: a checkpoint in another program's format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nuteprune.console import Output, megabytes, millions
from nuteprune.export.gguf.write import WrittenGguf, write_gguf
from nuteprune.export.onnx import WrittenOnnx, require_packages, write_onnx
from nuteprune.jobs.options import Exporting
from nuteprune.jobs.sources import load_model, load_tokenizer, read_config, use_family


def run(asked: Exporting, output: Output) -> dict[str, Any]:
    """Write a model's file, and say what is in it.

    Raises:
        UserError: for a model that cannot be written in the format.
        RunFailed: if writing goes wrong on the way.
    """
    use_family(asked.family, asked.model)
    read_config(asked.model)
    written = _write_onnx(asked, output) if asked.to == "onnx" else _write_gguf(asked, output)
    return {"out": str(asked.out), "type": asked.stored_as, **asdict(written)}


def _write_gguf(asked: Exporting, output: Output) -> WrittenGguf:
    model = asked.model
    tokenizer = load_tokenizer(model, asked.trust_remote_code)
    loaded = load_model(model, None)
    with output.bars() as bars:
        written = write_gguf(
            loaded,
            tokenizer,
            asked.out,
            type_name=asked.stored_as,
            name=Path(model).resolve().name if Path(model).exists() else model,
            pre_tokenizer=asked.pre_tokenizer,
            progress=lambda done, total: bars.update("writing tensors", done, total),
        )
    for note in written.notes:
        output.line(f"Note: {note}")
    output.line(
        f"{asked.out}: {asked.stored_as}, architecture {written.arch}, "
        f"{millions(written.parameters)} parameters, {megabytes(written.bytes)}"
    )
    output.line(
        f"Tokenizer: {written.texts_compared} texts split as before"
        if written.texts_compared
        else f"Tokenizer: the split {asked.pre_tokenizer} is unknown here, so nothing was compared"
    )
    return written


def _write_onnx(asked: Exporting, output: Output) -> WrittenOnnx:
    require_packages()
    loaded = load_model(asked.model, torch.float32)
    with output.bars() as bars:
        bars.update("tracing and comparing", 0, 1)
        written = write_onnx(loaded, asked.out)
        bars.update("tracing and comparing", 1, 1)
    output.line(
        f"{' and '.join(written.files)}: f32, {millions(written.parameters)} parameters, "
        f"{megabytes(written.bytes)}"
    )
    output.line(
        f"ONNX Runtime: a prompt, and tokens after it with the cache, give torch's logits to "
        f"{written.error:.1e} of the largest"
    )
    return written
