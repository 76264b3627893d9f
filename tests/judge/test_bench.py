from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from nuteprune.errors import RunFailed, UserError
from nuteprune.export.loading import load_pruned
from nuteprune.judge.bench import (
    Timing,
    compare,
    say_ratio,
    summarize,
    time_once,
    verdict,
)
from nuteprune.judge.work import Work, Workload, experts_met
from nuteprune.judge.worker import Worker
from tests.conftest import cache_of
from tests.forked import python, workers
from tests.greedy import continuation

SETTING = Workload(batch_size=2, length=6, new_tokens=3)


def load(folder: str) -> PreTrainedModel:
    torch.set_num_threads(1)
    return load_pruned(folder)


def kill_process() -> PreTrainedModel:
    import os

    os._exit(9)


def refuse() -> PreTrainedModel:
    raise UserError("no such model")


@pytest.fixture
def calls(tiny_model) -> tuple[PreTrainedModel, list[tuple[list[list[int]], int]]]:
    """A model, and what it is called with: tokens, and how many a cache held before."""
    model = tiny_model("llama")
    seen: list[tuple[list[list[int]], int]] = []

    def note(module: object, args: object, kwargs: dict) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        held = cache.get_seq_length() if cache is not None else 0
        seen.append((kwargs["input_ids"].tolist(), held))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return model, seen


def test_a_pass_decodes_what_generate_does(calls) -> None:
    model, seen = calls
    timing = time_once(model, SETTING)
    assert timing.first_token > 0
    assert timing.decode > 0
    assert [held for _, held in seen] == [0, 6, 7, 8]
    prompt = torch.tensor(seen[0][0])
    decoded = torch.tensor([tokens for tokens, _ in seen[1:]]).squeeze(-1).T
    assert torch.equal(decoded, continuation(model, prompt, 3, eos_token_id=None))


def test_work_is_that_of_the_modules(tiny_name: str, tiny_model) -> None:
    model = tiny_model(tiny_name)
    work = Work.of(model)
    linears = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    head = model.get_output_embeddings().weight
    table = model.get_input_embeddings().weight
    assert work.blocks == sum(linears.values())
    assert work.parameters == sum(p.numel() for p in model.parameters())
    assert work.parameters - work.moved == (0 if head is table else table.numel())
    cache = cache_of(model, torch.tensor([[5]]))
    attending = [x for x in cache.layers if hasattr(x, "keys")]
    assert work.cached == sum(x.keys.numel() + x.values.numel() for x in attending)
    heads = model.config.num_attention_heads * len(attending)
    assert work.queries == heads * 8
    assert (work.attention_blocks, work.mlp_blocks) == (3, 3)
    # Of 6 tokens the first meets one key and one value, the last six.
    met = sum(2 * work.queries * (t + 1) for t in range(6))
    assert work.prefill(SETTING) == 2 * (6 * work.blocks + head.numel() + met)
    # Three steps read the cache of 7, 8 and 9 tokens, of two sequences; some tiny windows are 6.
    unread = sum(each * max(0, 8 - window) for window, _, each in work.windows)
    assert work.decode(SETTING) == 4 * (work.moved + 2 * (8 * work.cached - unread))


def test_a_window_bounds_what_a_token_meets_and_reads(tiny_model) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model("gemma2", sliding_window=4, layer_types=kinds)
    work, whole = Work.of(model), Work.of(tiny_model("gemma2", sliding_window=64))
    queries, cached = work.queries // 3, work.cached // 3
    assert work.windows == ((4, queries, cached),) * 2
    setting = Workload(2, 10, 3)
    less = sum(2 * queries * (t + 1 - min(t + 1, 4)) for t in range(10))
    assert work.prefill(setting) == whole.prefill(setting) - 2 * 2 * less
    # Three steps read the cache of 11, 12 and 13 tokens, and of 4 where there is a window.
    assert work.decode(setting) == whole.decode(setting) - 4 * 2 * 2 * (12 - 4) * cached


@pytest.mark.parametrize(("experts", "per_token"), [(16, 2), (64, 8), (8, 8)])
def test_a_batch_meets_as_many_experts_as_drawn_tokens_do(experts: int, per_token: int) -> None:
    drawn = torch.rand(4000, 12, experts, generator=torch.Generator().manual_seed(0))
    chosen = drawn.topk(per_token).indices
    for tokens in (1, 2, 5, 12):
        met = torch.zeros(4000, experts).scatter_(1, chosen[:, :tokens].flatten(1), 1.0)
        expected = pytest.approx(float(met.sum(1).mean()), rel=0.01)
        assert experts_met(experts, per_token, tokens) == expected


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "llama4_text"])
def test_a_larger_batch_reads_more_experts(model_type: str, tiny_model) -> None:
    model = tiny_model(model_type)
    experts = [m for name, m in model.named_modules() if name.endswith(".experts")]
    stacks = [sum(p.numel() for p in m.parameters()) for m in experts]
    work = Work.of(model)
    assert [n * each for n, each in work.stacks] == stacks
    one, five = (work.decode(Workload(n, 2, 3)) for n in (1, 5))  # within a window
    cache = 4 * work.cached
    assert one == 4 * (work.moved + cache)
    share = experts_met(6, work.per_token, 5) / 6
    others = work.moved - sum(stacks) * work.per_token / 6
    assert five == pytest.approx(4 * (others + share * sum(stacks) + 5 * cache))


def test_figures_are_medians_of_rates() -> None:
    timings = [Timing(0.5, 1.5, 10), Timing(2.0, 3.0, 30), Timing(1.0, 6.0, 20)]
    found = summarize(SETTING, timings)
    assert found["prefill_tokens_per_second"] == {"median": 12.0, "low": 6.0, "high": 24.0}
    assert found["decode_tokens_per_second"] == {"median": 2.0, "low": 1.0, "high": 4.0}
    assert found["first_token_seconds"]["median"] == 1.0
    assert found["peak_memory_bytes"] == 30


def test_speed_is_compared_pass_by_pass_and_with_what_was_cut() -> None:
    dense, ours = work(blocks=160, moved=200), work(blocks=80, moved=120)
    old = [Timing(4.0, 2.0), Timing(40.0, 20.0)]  # the machine was busy in the second pass
    new = [Timing(2.0, 1.0), Timing(20.0, 10.0)]
    found = compare(SETTING, new, old, ours, dense)
    assert found["prefill"]["median"] == found["decode"]["median"] == 2.0
    assert found["prefill"]["bound"] == pytest.approx((6 * 160 + 40) / (6 * 80 + 40))
    assert found["decode"]["bound"] == pytest.approx(200 / 120)
    assert found["decode"]["reached"] is None  # two pairs are no measurement
    # Attention over the context is among the work, and so are blocks that are called no more.
    cut = work(blocks=80, moved=120, queries=8, cached=4, attention_blocks=1)
    whole = work(blocks=160, moved=200, queries=16, cached=8)
    found = compare(SETTING, new, old, cut, whole)
    assert found["prefill"]["bound"] == found["decode"]["bound"] == 3
    cut = dataclasses.replace(cut, attention_blocks=3)
    found = compare(SETTING, new, old, cut, whole)
    first = 6 * 160 + 40 + 16 * 42, 6 * 80 + 40 + 8 * 42
    assert found["prefill"]["bound"] == pytest.approx(first[0] / first[1])
    assert found["decode"]["bound"] == pytest.approx((200 + 2 * 8 * 8) / (120 + 2 * 8 * 4))


def work(**changes: int) -> Work:
    sizes = {"blocks": 160, "head": 40, "moved": 200, "queries": 0, "cached": 0} | changes
    blocks = {"attention_blocks": 3, "mlp_blocks": 3} | changes
    return Work(**{"parameters": 200, "bytes_per_parameter": 4, **sizes, **blocks})


@pytest.mark.parametrize(
    ("low", "median", "high", "passes", "said"),
    [
        (1.05, 1.1, 1.15, 5, "faster"),
        (0.8, 0.9, 0.95, 5, "slower"),
        (0.99, 1.1, 1.15, 5, "none"),
        (0.8, 0.9, 1.0, 5, "none"),
        (1.05, 1.1, 1.15, 4, "none"),
        (1.1, 1.21, 1.3, 5, "noise"),
        (0.9, 1.21, 1.3, 5, "noise"),
        (1.1, 1.2, 1.9, 5, "faster"),
    ],
)
def test_a_ratio_says_no_more_than_its_spread_and_its_bound_let_it(
    low: float, median: float, high: float, passes: int, said: str
) -> None:
    ratio = {"low": low, "median": median, "high": high, "bound": 1.2}
    assert verdict(ratio, passes) == said
    shown = say_ratio({**ratio, "verdict": said})
    assert (f"{median:.2f}" in shown) == (said in ("faster", "slower"))


def measured(ratio: float, spread: float = 0.0) -> dict[str, dict[str, Any]]:
    """A comparison of a model that takes `1 / ratio` of the dense one's time, its bound 2 x."""
    factors = torch.linspace(1 - spread, 1 + spread, 5).tolist()
    ours = [Timing(x / ratio, 3 * x / ratio) for x in factors]
    cut = work(blocks=80, head=0, moved=100)
    return compare(SETTING, ours, [Timing(1.0, 3.0)] * 5, cut, work(head=0))


def test_a_model_that_is_faster_is_told_how_near_to_its_bound() -> None:
    found = measured(1.9)
    assert found["decode"]["reached"] == pytest.approx(0.95)


@pytest.mark.parametrize("comparison", [measured(1.2, spread=0.3), measured(2.5)])
def test_what_is_no_measurement_has_no_share_of_the_bound(
    comparison: dict[str, dict[str, Any]],
) -> None:
    assert {x["verdict"] for x in comparison.values()} <= {"none", "noise"}
    assert {x["reached"] for x in comparison.values()} == {None}


def test_a_slower_model_has_no_share_of_the_bound() -> None:
    found = measured(0.5)
    assert {x["reached"] for x in found.values()} == {None}


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.mark.slow
def test_a_worker_times_its_model_in_another_process(folder: Path) -> None:
    with Worker("tiny", partial(load, str(folder))) as worker:
        timing = worker.time(SETTING)
        assert timing.first_token > 0
        assert timing.decode > 0
        assert 2**24 < timing.peak_memory < 2**34
        assert worker.about.threads == 1
        assert worker.about.work == Work.of(load_pruned(folder))
        with pytest.raises(RunFailed, match="Error"):
            worker.time(Workload(1, 0, 1))
        worker._process.join()
        with pytest.raises(RunFailed, match="ended with code 0"):
            worker.time(SETTING)


@pytest.mark.slow
def test_a_worker_does_not_run_the_script_that_starts_it_again(folder: Path) -> None:
    script = folder.parent / f"{folder.name}.py"  # as people write it, with no guard
    script.write_text(
        "import torch\n"
        "from nuteprune.jobs.timing import Computing\n"
        "from nuteprune.judge.worker import Worker\n"
        "print('begun')\n"
        "how = Computing('cpu', torch.float32, threads=1)\n"
        f"with Worker('tiny', how.loader_of({str(folder)!r})) as worker:\n"
        "    print(worker.about.threads)\n"
    )
    ran = python(script)
    assert (ran.out.split(), ran.code) == (["begun", "1"], 0), ran.err


@pytest.mark.slow
def test_a_worker_hands_errors_on(monkeypatch: pytest.MonkeyPatch) -> None:
    forked = SimpleNamespace(get_context=lambda _: workers())
    monkeypatch.setattr("nuteprune.judge.worker.multiprocessing", forked)
    with pytest.raises(UserError, match="no such model"):
        _ = Worker("tiny", refuse).about
    with pytest.raises(RunFailed, match=r"ended with code 9; perhaps memory[^-]*$"):
        _ = Worker("tiny", kill_process).about
