"""Times blocks with different counts of heads and neurons, as the model runs them.

A model of a few layers is made that have the counts in turn, so that one pass visits them all.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from nuteprune.console import dtype_name
from nuteprune.errors import UserError
from nuteprune.export.config import pruned_config
from nuteprune.export.loading import unfilled
from nuteprune.gates.costs import PHASES, SCHEMA
from nuteprune.judge.bench import PASSES, hardware_of, now, time_once
from nuteprune.judge.work import Workload
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import BLOCK_KINDS
from nuteprune.model.shape import LayerShape, Shape

MOST_NEURONS, MOST_GROUPS = 12, 6
"""Counts that are measured of a kind; between them it is interpolated."""
MULTIPLE = 64
"""The counts are multiples of it, where there are so many."""

MODEL = "model"
"""What is timed, beside blocks and layers."""
Times = dict[str, list[float]]
"""What was timed -> seconds of its calls in a pass: a prompt, then token by token."""


def counts_timed(shape: Shape, heads: bool = True) -> tuple[list[LayerShape], list[int]]:
    """Return the attentions (neurons 0) and the numbers of neurons that are measured.

    Args:
        shape: of the model that is to be cut.
        heads: whether heads can be cut; else attention is measured whole.
    """
    whole = max(shape.layers, key=lambda x: (x.kv_heads, x.heads))
    neurons = max(layer.neurons for layer in shape.layers)
    each = sorted({1, -(-whole.heads_per_group // 2), whole.heads_per_group})
    groups = _spaced(whole.kv_heads, MOST_GROUPS)
    attentions = [LayerShape(g * r, g, 0) for r in each for g in groups]
    if not heads:
        attentions = [LayerShape(whole.heads, whole.kv_heads, 0)]
    return attentions, _spaced(neurons, MOST_NEURONS)


def _spaced(most: int, count: int) -> list[int]:
    """Return about `count` numbers from 1 to `most`, in multiples where there is room for them.

    Multiples are powers of 2, as in models that are cut: other counts take longer than larger ones.
    """
    unit = min(MULTIPLE, 2 ** int(math.log2(max(1, most / count))))
    steps = (max(1, round(most * i / count / unit) * unit) for i in range(1, count))
    return sorted({1, *(min(x, most) for x in steps), most})


def trial_model(anatomy: Anatomy, attentions: Sequence[LayerShape], neurons: Sequence[int]) -> Any:
    """Return a model whose layers have the counts in turn, with arbitrary weights."""
    count = max(len(attentions), len(neurons))
    in_turn = zip(itertools.cycle(attentions[::-1]), itertools.cycle(neurons[::-1]), strict=False)
    layers = tuple(dataclasses.replace(x, neurons=n) for x, n in itertools.islice(in_turn, count))
    config = copy.deepcopy(anatomy.config)
    for name, values in vars(anatomy.config).items():  # some say things layer by layer
        if isinstance(values, list) and len(values) == len(anatomy.layers):
            setattr(config, name, [values[i % len(values)] for i in range(count)])
    config.num_hidden_layers = count
    shape = Shape(anatomy.shape.hidden, layers)
    return unfilled(pruned_config(config, anatomy.family, shape))


@contextmanager
def watched(anatomy: Anatomy) -> Iterator[Times]:
    """Note how long blocks (without their norms), layers and the model take within the context."""
    found: Times = {}

    def watch(name: str, first: nn.Module, last: nn.Module) -> None:
        started: list[float] = []
        calls = found.setdefault(name, [])
        stack.enter_context(
            first.register_forward_pre_hook(lambda *_: started.append(_now(anatomy)))
        )
        stack.enter_context(
            last.register_forward_hook(lambda *_: calls.append(_now(anatomy) - started.pop()))
        )

    with ExitStack() as stack:
        for i, layer in enumerate(anatomy.layers):
            attention = layer.get_submodule(anatomy.family.attention_module)
            mlp = [layer.get_submodule(path) for path in anatomy.family.mlp_modules]
            watch(f"attn_block {i}", attention, attention)
            watch(f"mlp_block {i}", mlp[0], mlp[-1])
            watch(f"layer {i}", layer, layer)
        watch(MODEL, anatomy.model, anatomy.model)
        yield found


def _now(anatomy: Anatomy) -> float:
    # A single thread's own time is not lengthened by what else the machine does.
    alone = anatomy.model.device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time() if alone else now(anatomy.model)


def cost_table(
    model: PreTrainedModel, setting: Workload, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the times of blocks of a model's kind.

    Args:
        model: the model that is to be cut; its weights are not used.
        setting: prompt and tokens that are timed.
        device: where it is timed.
        dtype: the one to compute in.

    Raises:
        UserError: if its layers are of several kinds, or have routed experts.
    """
    dense = Anatomy(model)
    if dense.family.mixer or dense.per_token:
        why = "its layers are of several kinds" if dense.family.mixer else "it routes to experts"
        raise UserError(
            f"blocks of {dense.family.model_type} cannot be timed by count: {why}; ask for "
            "--sparsity, --params, --size or --memory"
        )
    heads = not (dense.family.refusal("heads") and dense.family.refusal("kv_groups"))
    attentions, neurons = counts_timed(dense.shape, heads)
    trial = Anatomy(trial_model(dense, attentions, neurons).to(device=device, dtype=dtype))
    passes = []
    for i in range(PASSES + 1):
        with watched(trial) as found:
            time_once(trial.model, setting)
        if i:  # the first warms up
            passes.append(found)
    return {
        "schema": SCHEMA,
        "model_type": dense.family.model_type,
        "hidden": dense.shape.hidden,
        "head_dim": dense.head_dim,
        "layers": len(dense.layers),
        "device": device,
        "hardware": hardware_of(device),
        "dtype": dtype_name(dtype),
        "threads": torch.get_num_threads(),
        **dataclasses.asdict(setting),
        **table_of(passes, trial.shape, len(dense.layers)),
    }


def table_of(passes: Sequence[Times], shape: Shape, layers: int) -> dict[str, Any]:
    """Return the rows of a table: medians over passes, tokens, and layers of like counts.

    Args:
        passes: what `watched` noted in each.
        shape: of the model that was timed.
        layers: of the model that the table is for.
    """

    def row(block: str, **counts: int) -> dict[str, Any]:
        alike = [
            f"{block} {i}"
            for i, layer in enumerate(shape.layers)
            if all(getattr(layer, kind) == count for kind, count in counts.items())
        ]
        return {**counts, **_medians([found[name] for found in passes for name in alike])}

    attention = sorted({(x.heads, x.kv_heads) for x in shape.layers})
    neurons = sorted({x.neurons for x in shape.layers})
    return {
        "attention": [row("attn_block", heads=h, kv_heads=g) for h, g in attention],
        "mlp": [row("mlp_block", neurons=n) for n in neurons],
        "rest": _rest(passes, len(shape.layers), layers),
    }


def _medians(calls: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the median seconds of a prompt, and of a token after it, of calls in that order."""
    prompts, tokens = [x[0] for x in calls], [token for x in calls for token in x[1:]]
    return dict(zip(PHASES, map(statistics.median, (prompts, tokens)), strict=True))


def _rest(passes: Sequence[Times], timed: int, layers: int) -> dict[str, float]:
    """Return the seconds spent outside blocks: in each layer, and outside layers."""
    rests = []
    for times in passes:
        whole, inside, inner = (
            np.sum([calls for name, calls in times.items() if name.startswith(kinds)], axis=0)
            for kinds in (MODEL, "layer", BLOCK_KINDS)
        )
        rests.append(whole - inside + (inside - inner) / timed * layers)
    return {phase: max(0.0, seconds) for phase, seconds in _medians(rests).items()}
