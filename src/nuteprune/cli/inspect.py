"""`nuteprune inspect`: what a pruned checkpoint is made of, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuteprune.cli import options as o
from nuteprune.cli.output import Output, millions
from nuteprune.export.checkpoint import recount
from nuteprune.export.record import read_record


def inspect(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that nuteprune wrote.")],
    as_json: o.Json = False,
) -> None:
    """Show the layers, parameters and quality of a pruned checkpoint."""
    output = Output(as_json)
    record = read_record(folder)
    counted = recount(folder)["total"]
    rows = [
        [
            str(i),
            _change(old["heads"], new["heads"]),
            _change(old["kv_heads"], new["kv_heads"]),
            _change(old["neurons"], new["neurons"]),
        ]
        for i, (old, new) in enumerate(zip(record["layers_before"], record["layers"], strict=True))
    ]
    output.table(
        f"{folder}: {record['base_model']}, {record['shapes']} shapes",
        ["layer", "heads", "KV heads", "neurons"],
        rows,
    )
    params, hidden = record["params"], record["hidden"]
    output.line(f"Width       {_change(hidden['before'], hidden['after'])}")
    output.line(
        f"Parameters  {millions(params['before'])} -> {millions(params['after'])}, "
        f"{record['total_sparsity']:.2%} gone; in decoder projections "
        f"{millions(params['blocks_before'])} -> {millions(params['blocks_after'])}, "
        f"{record['sparsity']:.3%} gone (target {record['target']:.1%})"
    )
    for source, value in record["perplexity"]["after"].items():
        before = record["perplexity"]["before"].get(source)
        change = f"{value:.2f}" if before is None else f"{before:.2f} -> {value:.2f}"
        output.line(f"Perplexity  {source}: {change}")
    output.line(f"Teachers    {record['teachers']['count']}")
    if "recover" in record:
        tuned = record["recover"]
        output.line(f"Recovered   {tuned['steps']} steps on {tuned['data']} ({tuned['kind']})")
    if counted != params["after"]:
        output.line(f"WARNING     the files hold {counted:,} parameters, the record says otherwise")
    output.result({**record, "counted": counted})


def _change(before: int, after: int) -> str:
    return str(after) if before == after else f"{before} -> {after}"
