"""`nuteprune eval`: perplexity of a checkpoint, dense or pruned, on held-out text."""

from __future__ import annotations

from typing import Annotated

import typer

from nuteprune.cli import options as o
from nuteprune.cli.output import Output
from nuteprune.cli.sources import load_model, load_tokenizer, pick_device, pick_dtype
from nuteprune.judge.perplexity import mean, perplexities, protocol
from nuteprune.train.data import held_out_blocks


def evaluate(
    model: o.Model,
    against: Annotated[
        str | None, typer.Option(help="The dense model, for the ratio of perplexities.")
    ] = None,
    data: Annotated[str, typer.Option(help="Text; its held-out part is judged.")] = "demo",
    length: Annotated[int, typer.Option(help="Tokens per block.")] = 256,
    blocks: Annotated[int, typer.Option(help="Blocks per source.")] = 24,
    batch_size: Annotated[int, typer.Option(help="Blocks per forward pass.")] = 4,
    device: o.Device = None,
    dtype: o.Dtype = None,
    text_column: o.TextColumn = None,
    as_json: o.Json = False,
) -> None:
    """Measure the perplexity of MODEL on held-out text."""
    output = Output(as_json)
    names = [model] if against is None else [model, against]
    kind = pick_device(device or "auto")
    tokenizer = load_tokenizer(model)
    sources = held_out_blocks(data, tokenizer, length=length, count=blocks, text_column=text_column)
    results = {}
    with output.bars() as bars:
        for i, name in enumerate(names):
            bars.update("measuring", i, len(names), name)
            loaded = load_model(name, pick_dtype(dtype or "auto", kind)).to(kind)  # type: ignore[arg-type]
            results[name] = perplexities(loaded, sources, batch_size=batch_size)
            del loaded
        bars.update("measuring", len(names), len(names))
    rows = [
        [name, *(f"{v:.2f}" for v in r.values()), f"{mean(r):.2f}"] for name, r in results.items()
    ]
    if against is not None:
        ours, theirs = results[model], results[against]
        ratios = [ours[s] / theirs[s] for s in sources]
        rows.append(["ratio", *(f"{x:.3f}" for x in ratios), f"{mean(ours) / mean(theirs):.3f}"])
    output.table(
        f"Perplexity on held-out text ({data}, up to {blocks} blocks of {length} tokens each)",
        ["", *sources, "mean"],
        rows,
    )
    output.result({"perplexity": results, "protocol": protocol(sources)})
