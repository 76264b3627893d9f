"""`nuteprune export`: a checkpoint in another format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nuteprune.cli import options as o
from nuteprune.errors import UserError
from nuteprune.files import at_home, data_files
from nuteprune.jobs.guard import check_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nuteprune.console import Output

TYPES = {"gguf": ("f16", "bf16", "q8_0", "q4_0", "f32"), "onnx": ("f32",)}
"""Format -> how it stores weights, the default first; see `gguf.write.FILE_TYPES`."""


def export(
    model: o.Model,
    to: Annotated[str, typer.Option(help="Format: gguf (llama.cpp) or onnx (ONNX Runtime).")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            help=f"How weights are stored. gguf: {', '.join(TYPES['gguf'])}; onnx: f32. "
            "Default: the first.",
        ),
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            help="For gguf: llama.cpp's name for how the tokenizer splits text. Default: found."
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    family: o.Family = None,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Write MODEL, pruned or not, in another program's format."""
    out = at_home(out)
    if to not in TYPES:
        raise UserError(f"--to {to} is not a known format; pass one of {', '.join(TYPES)}")
    type_name = TYPES[to][0] if type_name is None else type_name
    if type_name not in TYPES[to]:
        raise UserError(
            f"--type {type_name} is unknown to --to {to}; pass one of {', '.join(TYPES[to])}"
        )
    if pre_tokenizer is not None and to != "gguf":
        raise UserError(f"--pre-tokenizer is for --to gguf; leave it out with --to {to}")
    reads = [("model", model), ("entry", family)]
    beside = data_files(out) if to == "onnx" else ()
    check_file("--out", out, reads, overwrite, f"model.{to}", beside)
    from nuteprune.console import Output
    from nuteprune.jobs.sources import load_tokenizer, read_config, use_family

    output = Output(as_json)
    use_family(family, model)
    read_config(model)
    if to == "onnx":
        _export_onnx(model, out, output)
    else:
        tokenizer = load_tokenizer(model, trust_remote_code)
        _export_gguf(model, out, type_name, pre_tokenizer, tokenizer, output)


def _export_gguf(
    model: str,
    out: Path,
    type_name: str,
    pre_tokenizer: str | None,
    tokenizer: PreTrainedTokenizerBase,
    output: Output,
) -> None:
    from nuteprune.console import megabytes, millions
    from nuteprune.export.gguf.write import write_gguf
    from nuteprune.jobs.sources import load_model

    loaded = load_model(model, None)
    with output.bars() as bars:
        written = write_gguf(
            loaded,
            tokenizer,
            out,
            type_name=type_name,
            name=Path(model).resolve().name if Path(model).exists() else model,
            pre_tokenizer=pre_tokenizer,
            progress=lambda done, total: bars.update("writing tensors", done, total),
        )
    for note in written.notes:
        output.line(f"Note: {note}")
    output.line(
        f"{out}: {type_name}, architecture {written.arch}, {millions(written.parameters)} "
        f"parameters, {megabytes(written.bytes)}"
    )
    output.line(
        f"Tokenizer: {written.texts_compared} texts split as before"
        if written.texts_compared
        else f"Tokenizer: the split {pre_tokenizer} is unknown here, so nothing was compared"
    )
    output.result({"out": str(out), "type": type_name, **asdict(written)})


def _export_onnx(model: str, out: Path, output: Output) -> None:
    import torch

    from nuteprune.console import megabytes, millions
    from nuteprune.export.onnx import require_packages, write_onnx
    from nuteprune.jobs.sources import load_model

    require_packages()
    loaded = load_model(model, torch.float32)
    with output.bars() as bars:
        bars.update("tracing and comparing", 0, 1)
        written = write_onnx(loaded, out)
        bars.update("tracing and comparing", 1, 1)
    output.line(
        f"{' and '.join(written.files)}: f32, {millions(written.parameters)} parameters, "
        f"{megabytes(written.bytes)}"
    )
    output.line(
        f"ONNX Runtime: a prompt, and tokens after it with the cache, give torch's logits to "
        f"{written.error:.1e} of the largest"
    )
    output.result({"out": str(out), "type": "f32", **asdict(written)})
