"""What blocks take: the model that is timed, and the table that comes of timings."""

from __future__ import annotations

import time

import pytest
import torch

from nuteprune.gates.budget import Budget
from nuteprune.gates.costs import seconds_of
from nuteprune.judge.bench import time_once
from nuteprune.judge.block_times import (
    cost_table,
    counts_timed,
    table_of,
    trial_model,
    watched,
)
from nuteprune.judge.work import Workload
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.shape import LayerShape, Shape


def test_the_counts_that_are_timed_reach_from_one_to_all() -> None:
    shape = Shape(64, (LayerShape(32, 8, 14336), LayerShape(32, 8, 14000)))
    attentions, neurons = counts_timed(shape)
    assert {x.kv_heads for x in attentions} == {1, 3, 4, 5, 7, 8}
    assert {x.heads_per_group for x in attentions} == {1, 2, 4}
    assert (neurons[0], neurons[-1], len(neurons)) == (1, 14336, 13)
    assert all(n % 32 == 0 for n in neurons[1:])
    attentions, neurons = counts_timed(Shape(8, (LayerShape(1, 1, 3),)))
    assert (attentions, neurons) == ([LayerShape(1, 1, 0)], [1, 2, 3])


@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_a_pass_visits_every_count_as_the_model_would_run_it(plain_name: str, tiny_model) -> None:
    dense = Anatomy(tiny_model(plain_name))
    heads = not dense.family.refusal("heads")
    attentions, neurons = counts_timed(dense.shape, heads)
    trial = Anatomy(trial_model(dense, attentions, neurons))
    layers = trial.shape.layers
    assert {(x.heads, x.kv_heads) for x in layers} == {(x.heads, x.kv_heads) for x in attentions}
    assert {x.neurons for x in layers} == set(neurons)
    assert trial.shape.hidden == dense.shape.hidden
    with watched(trial) as found:
        time_once(trial.model, Workload(2, 5, 4))
    for i in range(len(layers)):
        parts = [found[f"{name} {i}"] for name in ("attn_block", "mlp_block", "layer")]
        # A prompt, and four tokens after it; blocks are within their layer.
        assert [len(x) for x in parts] == [5, 5, 5]
        assert all(a + b <= whole for a, b, whole in zip(*parts, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trial.model.modules())


def test_a_table_has_medians_by_count() -> None:
    shape = Shape(8, (LayerShape(4, 2, 10), LayerShape(2, 1, 10), LayerShape(4, 2, 5)))
    passes = [
        {
            # Prompt, then two tokens.
            **{f"attn_block {i}": [10.0 + n, 1.0, 3.0] for i in range(3)},
            **{f"mlp_block {i}": [20.0 * (1 + i), 4.0, 4.0] for i in range(3)},
            **{f"layer {i}": [10.0 + n + 20 * (1 + i) + 2, 7.0, 9.0] for i in range(3)},
            "model": [3 * (12.0 + n) + 120 + 5, 3 * 7.0 + 3, 3 * 9.0 + 3],
        }
        for n in (0.0, 1.0, 50.0)
    ]
    found = table_of(passes, shape, layers=30)
    assert found["attention"] == [
        {"heads": 2, "kv_heads": 1, "prefill": 11.0, "decode": 2.0},
        {"heads": 4, "kv_heads": 2, "prefill": 11.0, "decode": 2.0},
    ]
    assert found["mlp"] == [
        {"neurons": 5, "prefill": 60.0, "decode": 4.0},
        {"neurons": 10, "prefill": 30.0, "decode": 4.0},
    ]
    # 5 outside of the layers and 2 in each; 3 for a token, and 2 of 8 in each layer.
    assert found["rest"] == {"prefill": 5 + 2 * 30, "decode": pytest.approx(3 + 2 * 30)}


def test_a_single_thread_is_timed_by_its_own_clock(tiny_model, monkeypatch) -> None:
    anatomy = Anatomy(tiny_model("llama"))
    monkeypatch.setattr(anatomy.layers[1].mlp, "forward", lambda x: time.sleep(0.2) or x)
    found = {}
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with watched(anatomy) as found[threads]:
            anatomy.model(torch.full((1, 4), 3))
    for name in ("mlp_block 1", "layer 1", "model"):
        assert found[1][name][0] < 0.1 < found[2][name][0]


def test_the_table_of_a_model_prices_it(tiny_model) -> None:
    model = tiny_model("llama")
    found = cost_table(model, Workload(1, 6, 3), "cpu", torch.float32)
    budget = Budget.of(Anatomy(model))
    for phase in ("prefill", "decode", "both"):
        seconds = seconds_of(found, budget, phase)
        assert 0 < seconds.rest_s < seconds.total(budget.shape) < 10
    assert (found["batch_size"], found["length"], found["new_tokens"]) == (1, 6, 3)
