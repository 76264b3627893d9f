"""The job of `inspect`: what a pruned checkpoint is made of, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from math import gcd, prod
from pathlib import Path
from typing import Any

import torch

from nuteprune.console import Output, millions
from nuteprune.export.card import perplexities_of, since_dense
from nuteprune.export.checkpoint import recount
from nuteprune.export.clients import warnings
from nuteprune.export.gguf.refusals import ModelFacts
from nuteprune.export.loading import class_of, load_config, one_line
from nuteprune.export.record import read_record
from nuteprune.gates.budget import Budget
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.lookup import of_language_model
from nuteprune.model.shape import COUNTS, SAID, Shape

Tensors = Mapping[str, list[int]]


def run(folder: Path, output: Output) -> dict[str, Any]:
    """Print what a checkpoint is made of, and return it.

    Raises:
        UserError: if it is none that nuteprune wrote.
    """
    record, config = read_record(folder), load_config(folder)
    counted = recount(folder)
    with one_line(str(folder)), torch.device("meta"):
        anatomy = Anatomy(class_of(config.model_type)(config))
    before, after = shapes_of(record)
    tensors = of_language_model(counted["tensors"])
    outside = _count(counted["tensors"], counted["tensors"]) - _count(tensors, tensors)
    source = ModelFacts(anatomy.family, config, after, anatomy.biases)
    rows = record.get("vocab", {"before": 1, "after": 1})
    params = {**record["params"], "before": record["params"]["before"] - outside}
    parts = parts_of(Budget.of(anatomy), before, tensors, params, (rows["before"], rows["after"]))
    if outside:
        parts["other modalities"] = (outside, outside)
    multiples = multiples_of(source)
    found = warnings(source)
    if counted["total"] != record["params"]["after"]:
        found.append(f"the files hold {counted['total']:,} parameters, the record says otherwise")
    _print_layers(folder, record, output)
    _print_parts(parts, record, output)
    output.line(
        f"Multiples   width {multiples['hidden']}, neurons {multiples['neurons']}, "
        f"heads x head_dim {multiples['heads']}; tensor-parallel sizes "
        f"{', '.join(map(str, multiples['tensor_parallel']))}"
    )
    found_before, found_after = perplexities_of(record)
    for name, value in found_after.items():
        dense = found_before.get(name)
        change = f"{value:.2f}" if dense is None else f"{dense:.2f} -> {value:.2f}"
        output.line(f"Perplexity  {name}: {change}")
    if count := record.get("teachers", {}).get("count"):  # the dense model alone leaves none
        output.line(f"Teachers    {count} snapshots on the way")
    if "recover" in record:
        tuned = record["recover"]
        output.line(
            f"Recovered   {tuned['steps']} steps on {tuned['data']} ({tuned.get('kind', 'text')})"
        )
    for line in found:
        output.line(f"WARNING     {line}")
    return {
        **record,
        "counted": counted["total"],
        "parts": {k: {"before": x, "after": y} for k, (x, y) in parts.items()},
        "multiples": multiples,
        "warnings": found,
    }


def shapes_of(record: Mapping[str, Any]) -> tuple[Shape, Shape]:
    """Return the dimensions before and after pruning that a record states."""

    def shape(when: str, layers: str) -> Shape:
        rows = [{k: x[k] for k in (*COUNTS, "mixer") if k in x} for x in record[layers]]
        return Shape.from_dict({"hidden": record["hidden"][when], "layers": rows})

    return shape("before", "layers_before"), shape("after", "layers")


def parts_of(
    budget: Budget,
    before: Shape,
    tensors: Tensors,
    params: Mapping[str, int],
    rows: tuple[int, int],
) -> dict[str, tuple[int, int]]:
    """Return the parameters of each part before and after.

    Args:
        budget: of the pruned model.
        before: dimensions of the dense one.
        tensors: what the files hold, name -> shape.
        params: the record's counts.
        rows: rows of the embedding before and after, if some were removed.
    """
    family, after = budget.family, budget.shape

    def blocks(shape: Shape, all_blocks: int) -> dict[str, int]:
        forms = map(budget.attention, shape.layers)
        attention = sum(c * shape.hidden + constant for c, constant in forms)
        # By subtraction: where all MLPs are gone, nothing tells whether they had biases.
        return {"attention": attention, "MLP": all_blocks - attention}

    old, new = blocks(before, params["blocks_before"]), blocks(after, params["blocks_after"])
    inside = (f"{family.layers}.", f"{family.final_norm}.")
    outside = [n for n in tensors if not n.startswith(inside)]
    new["embedding and head"] = _count(tensors, outside)
    base = f"{family.layers.partition('.')[0]}."  # outside of it is the head
    places = [n for n in outside if n.startswith(base) and not n.startswith(f"{family.embedding}.")]
    by_place = _count(tensors, places)  # position embeddings, which have no rows of tokens
    by_token = (new["embedding and head"] - by_place) * rows[0] // rows[1]
    old["embedding and head"] = (by_token + by_place) * before.hidden // after.hidden
    rest = "norms and routers" if family.experts else "norms"
    new[rest] = _count(tensors, tensors) - sum(new.values())
    old[rest] = params["before"] - sum(old.values())
    return {name: (old[name], new[name]) for name in old}


def _count(tensors: Tensors, names: Iterable[str]) -> int:
    return sum(prod(tensors[name]) for name in names)


def multiples_of(source: ModelFacts) -> dict[str, Any]:
    """Return the common multiples of all layers' counts, and the tensor-parallel sizes."""
    layers = source.shape.layers
    kv_heads = gcd(*(x.kv_heads for x in layers))
    neurons = gcd(*(n for x in layers for n in (x.neurons, x.expert_neurons)))
    both = gcd(kv_heads, neurons)
    return {
        "hidden": _largest_power_of_two(source.shape.hidden),
        "neurons": _largest_power_of_two(neurons),
        "heads": _largest_power_of_two(gcd(*(x.heads for x in layers)) * source.head_dim),
        "tensor_parallel": [x for x in range(1, both + 1) if both % x == 0],
    }


def _largest_power_of_two(number: int) -> int:
    return number & -number


def _print_layers(folder: Path, record: Mapping[str, Any], output: Output) -> None:
    """Print the counts of each layer, equal neighbours in one row."""
    words = {k: v for k, v in SAID.items() if any(x.get(k) for x in record["layers_before"])}
    changes = [
        [_change(old.get(k, 0), new.get(k, 0)) for k in words]
        for old, new in zip(record["layers_before"], record["layers"], strict=True)
    ]
    rows, first = [], 0
    for cells, same in groupby(changes):
        last = first + len(list(same)) - 1
        rows.append([str(first) if first == last else f"{first}-{last}", *cells])
        first = last + 1
    output.table(
        f"{folder}: {record.get('base_model') or 'pruned'}, {record.get('shapes', 'free')} shapes",
        ["layer", *words.values()],
        rows,
    )


def _print_parts(
    parts: Mapping[str, tuple[int, int]], record: Mapping[str, Any], output: Output
) -> None:
    params, hidden = record["params"], record["hidden"]
    shown = {
        **parts,
        "decoder projections": (params["blocks_before"], params["blocks_after"]),
        "all": (params["before"], params["after"]),
    }
    if "active_before" in params:
        shown["active per token"] = (params["active_before"], params["active_after"])
    output.table(
        "Parameters",
        ["", "before", "after", "gone"],
        [
            [name, millions(old), millions(new), f"{(old - new) / old:.2%}" if old else ""]
            for name, (old, new) in shown.items()
        ],
    )
    output.line(f"Width       {_change(hidden['before'], hidden['after'])}")
    output.line(
        f"Sparsity    {record['sparsity']:.3%} of the decoder projections (target "
        f"{record['target']:.1%}), {record['total_sparsity']:.3%} of all parameters"
    )
    if record.get("history"):
        whole = since_dense(record)
        output.line(
            f"In all      {whole['sparsity']:.3%} and {whole['total_sparsity']:.3%} of the dense "
            "model, with the runs before this one"
        )


def _change(before: int, after: int) -> str:
    return str(after) if before == after else f"{before} -> {after}"
