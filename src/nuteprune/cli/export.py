"""`nuteprune export`: a checkpoint in another format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nuteprune.cli import options as o
from nuteprune.cli.output import Output, megabytes, millions
from nuteprune.cli.sources import load_tokenizer, locate, read_config
from nuteprune.errors import UserError
from nuteprune.export.checkpoint import load_pruned
from nuteprune.export.gguf import FILE_TYPES, write_gguf

FORMATS = ("gguf",)


def export(
    model: o.Model,
    to: Annotated[str, typer.Option(help="Format: gguf (llama.cpp).")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    type_name: Annotated[
        str, typer.Option("--type", help=f"How weights are stored: {', '.join(FILE_TYPES)}.")
    ] = "f16",
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(help="llama.cpp's name for the tokenizer's split; default: found by trying."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Write MODEL, pruned or not, in another program's format."""
    output = Output(as_json)
    if to not in FORMATS:
        raise UserError(f"--to {to} is no format known here; pass one of {', '.join(FORMATS)}")
    if type_name not in FILE_TYPES:
        raise UserError(f"--type {type_name} is unknown; pass one of {', '.join(FILE_TYPES)}")
    if out.is_dir():
        raise UserError(
            f"--out {out} is a folder; name the file to write, such as {out}/model.gguf"
        )
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; pass --overwrite to replace it, or name another file")
    read_config(model)
    tokenizer = load_tokenizer(model, trust_remote_code)
    loaded = load_pruned(locate(model), dtype="auto")
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
