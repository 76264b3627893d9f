"""Costs in seconds: by hand, and the allocator against all shapes that there are."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from nuteprune.errors import UserError
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.allowed_shapes import Constraints
from nuteprune.gates.costs import Goal, seconds_of
from nuteprune.model.shape import LayerShape, Shape

from .test_allocate import CASES, GROUPED, MULTI_HEAD, Case, random_scores

CASE = Case((GROUPED, GROUPED), ("kv_groups", "heads", "neurons", "attn_block", "mlp_block"))


def table(**changes: Any) -> dict[str, Any]:
    attention = [(6, 2, 9.0), (3, 1, 5.0), (2, 2, 5.0), (1, 1, 3.0)]
    return {
        **{"schema": 1, "model_type": "llama", "hidden": 16, "head_dim": 4, "layers": 2},
        "new_tokens": 10,
        "attention": [
            {"heads": h, "kv_heads": g, "prefill": 10 * s, "decode": s} for h, g, s in attention
        ],
        "mlp": [{"neurons": n, "prefill": 40.0 + n, "decode": 4 + n / 10} for n in (1, 8, 24)],
        "rest": {"prefill": 7.0, "decode": 0.5},
    } | changes


def test_counts_between_measured_ones_are_interpolated() -> None:
    decode, prefill, both = (
        seconds_of(table(), CASE.budget, x) for x in ("decode", "prefill", "both")
    )
    whole = CASE.budget.shape
    # A table has the seconds of one token; a pass has ten.
    assert decode.total(whole) == pytest.approx(10 * (0.5 + 2 * (9 + 6.4)))
    assert prefill.total(whole) == pytest.approx(7 + 2 * (90 + 64))
    assert both.total(whole) == pytest.approx(decode.total(whole) + prefill.total(whole))
    # Two heads on one KV head: between one and three of them.
    cut = Shape(16, (LayerShape(2, 1, 16), LayerShape(0, 0, 0)))
    assert decode.total(cut) == pytest.approx(10 * (0.5 + (3 + 5) / 2 + 4 + 1.6))


def test_fewer_neurons_never_cost_more_than_were_timed_of_more() -> None:
    noisy = [{"neurons": n, "prefill": 1.0, "decode": s} for n, s in ((1, 4), (8, 9), (24, 6))]
    seconds = seconds_of(table(mlp=noisy), CASE.budget, "decode")
    found = [seconds.mlp(0, LayerShape(6, 2, n))[1] for n in (1, 8, 16, 24)]
    assert found == pytest.approx([40, 60, 60, 60])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 32}, "of hidden 32, not 16"),
        ({"model_type": "qwen2"}, "of model_type qwen2"),
        ({"layers": 3}, "of layers 3"),
        ({"schema": 2}, "of schema 2"),
        ({"mlp": []}, "says nothing of 2 KV heads and 24 neurons"),
        ({"mlp": [{"neurons": 8, "prefill": 1, "decode": 1}]}, "says nothing of"),
        ({"attention": [{"heads": 3, "kv_heads": 1, "prefill": 1, "decode": 1}]}, "says nothing"),
        ({"attention": [{"heads": 3}]}, "cannot be read .KeyError"),
        ({"rest": None}, "cannot be read .TypeError"),
        ({"new_tokens": "many"}, "cannot be read .ValueError"),
    ],
)
def test_a_table_of_another_model_or_none_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        seconds_of(table(**changes), CASE.budget, "decode")
    assert "nuteprune bench MODEL --save-costs FILE" in str(error.value)


@pytest.mark.parametrize("seed", range(12))
def test_the_shape_is_the_cheapest_of_all_that_are_fast_enough(seed: int) -> None:
    drawn = random.Random(seed)
    name = drawn.choice([x for x, case in CASES.items() if "hidden" not in case.kinds])
    case = CASES[name]
    whole = max(case.layers, key=lambda x: x.heads)
    counts = {"layers": len(case.layers), "model_type": case.model_type}
    rows = [
        {"heads": g * r, "kv_heads": g, "prefill": 0, "decode": drawn.uniform(1, 2) + g * r}
        for r in range(1, whole.heads_per_group + 1)
        for g in range(1, max(x.kv_heads for x in case.layers) + 1)
    ]
    mlp = [{"neurons": n, "prefill": 0, "decode": drawn.uniform(3, 5) + n} for n in (1, 8, 16, 24)]
    seconds = seconds_of(table(**counts, attention=rows, mlp=mlp), case.budget, "decode")
    goal = Goal(seconds, drawn.uniform(0.5, 0.95) * seconds.total(case.budget.shape), "", str, "")
    scores = random_scores(case, seed)
    costs = {shape: seconds.total(shape) for shape in case.shapes}
    enough = [shape for shape in costs if costs[shape] <= goal.limit]
    if not enough:
        with pytest.raises(UserError, match="out of reach"):
            case.allocator.shape(scores, goal)
        return
    shape = case.allocator.shape(scores, goal)
    assert shape in enough
    parts = case.split(scores)
    # What is within 0.1 % of the dense model's cost counts as equally far; the nearest always does.
    near = max(0.001 * seconds.total(case.budget.shape), goal.limit - max(costs[x] for x in enough))
    close = [x for x in enough if goal.limit - costs[x] <= near]
    assert case.loss(shape, parts) <= min(case.loss(x, parts) for x in close)


def test_blocks_go_where_it_is_calls_that_cost() -> None:
    calls = [
        {"heads": g, "kv_heads": g, "prefill": 1, "decode": 10.0} for g in (1, MULTI_HEAD.heads)
    ]
    case = Case((MULTI_HEAD, MULTI_HEAD), ("heads", "neurons", "attn_block"))
    rows = [{"neurons": n, "prefill": 1, "decode": 1.0} for n in (1, 24)]
    seconds = seconds_of(table(attention=calls, mlp=rows), case.budget, "decode")
    allocator = Allocator(case.budget, Constraints(case.kinds, False, 8, 64))
    goal = Goal(seconds, 0.7 * seconds.total(case.budget.shape), "", str, "")
    scores = {k: torch.ones(allocator.layout.units(k)) for k in case.kinds}
    scores["attn_block"] *= 100  # by parameters they would stay
    plain = allocator.shape(scores, 0.2)
    assert all(layer.attention for layer in plain.layers)
    kept = allocator.shape(scores, goal)
    assert [layer.attention for layer in kept.layers] == [True, False]
    assert kept.layers[0] == MULTI_HEAD  # nothing goes that saves no time
