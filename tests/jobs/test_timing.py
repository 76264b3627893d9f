"""Timings that are injected: what is told of them on a machine that is busy with something else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nuteprune.console import Output
from nuteprune.jobs import timing
from nuteprune.jobs.timing import Computing, for_report, measure
from nuteprune.judge.bench import Timing
from nuteprune.judge.report import told_gains
from nuteprune.judge.work import Work, Workload
from nuteprune.judge.worker import About

BOUND = 1.25
WORKS = {
    "small": Work(80, 80, 0, 80, 4, 0, 0, 3, 3),
    "dense": Work(100, 100, 0, 100, 4, 0, 0, 3, 3),
}
ALONE = {"small": 0.85, "dense": 1.0}
"""Seconds of a pass on a machine that does nothing else: 1.18 times faster."""


@pytest.fixture
def injected(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`injected(loads)`: measures with passes that take so many times longer, one after another."""

    def measured(loads: Iterator[float], repeats: int = 5) -> tuple[dict[str, Any], list[str]]:
        order: list[str] = []

        class Fake:
            def __init__(self, name: str, *_: Any) -> None:
                self.name = name
                self.about = About(WORKS[name], "sdpa", 1, "CPU")

            def time(self, _: Workload) -> Timing:
                order.append(self.name)
                seconds = ALONE[self.name] * next(loads)
                return Timing(seconds, seconds)

            def __enter__(self) -> Fake:
                return self

            def __exit__(self, *_: object) -> None:
                pass

        monkeypatch.setattr(timing, "Worker", Fake)
        monkeypatch.setattr(timing, "_on_disk", lambda _: None)
        settings, how = [Workload(1, 8, 4)], Computing("cpu", torch.float32)
        with Output(quiet=True).bars() as bars:
            found = measure(["small", "dense"], settings, repeats, how, bars)
        return found, order

    return measured


def both(phases: dict[str, Any]) -> set[str]:
    return {phases[phase]["verdict"] for phase in ("prefill", "decode")}


def test_passes_are_in_turns_and_the_first_counts_for_nothing(injected: Any) -> None:
    loads = iter([50.0, 1.0, *[1.0] * 10])
    found, order = injected(loads)
    assert order == ["small", "dense", "dense", "small"] * 3
    ratio = found["settings"][0]["speedup"]["decode"]
    assert ratio["median"] == ratio["low"] == ratio["high"] == pytest.approx(1 / 0.85)
    assert ratio["bound"] == BOUND
    assert both(found["settings"][0]["speedup"]) == {"faster"}
    assert told_gains(for_report(found)) == pytest.approx([1 / 0.85] * 2)


@pytest.mark.parametrize(
    ("slow", "said"),
    [
        ({"dense": 1.5}, "noise"),  # 1.76 times faster: beyond the bound
        ({"small": 1 / 0.85}, "none"),
        ({"small": 1.5}, "slower"),
    ],
)
def test_a_load_that_hits_one_of_the_two(slow: dict[str, float], said: str, injected: Any) -> None:
    order = ["small", "dense", "dense", "small"] * 3
    found, _ = injected(iter([slow.get(name, 1.0) for name in order]))
    speedup = found["settings"][0]["speedup"]
    assert both(speedup) == {said}
    assert bool(told_gains(for_report(found))) == (said == "slower")
    notes = for_report(found)["notes"][0]
    assert f"{speedup['decode']['median']:.2f} x" in notes or said != "slower"
    assert f"{speedup['decode']['median']:.2f}" not in notes or said == "slower"


def test_too_few_passes_tell_nothing(injected: Any) -> None:
    found, _ = injected(iter([1.0] * 10), repeats=4)
    assert both(found["settings"][0]["speedup"]) == {"none"}


def test_no_load_makes_a_verdict_above_the_bound_or_within_the_spread(injected: Any) -> None:
    said: set[str] = set()
    for seed in range(200):
        drawn = random.Random(seed)
        busy = [1, 1, 1.2, 2, 4][: drawn.randint(2, 5)]  # some machines are less loaded
        found, _ = injected(iter([drawn.choice(busy) for _ in range(12)]))
        for ratio in found["settings"][0]["speedup"].values():
            said.add(ratio["verdict"])
            if ratio["verdict"] in ("faster", "slower"):
                assert ratio["median"] <= BOUND
                assert not ratio["low"] <= 1 <= ratio["high"]
        told = told_gains(for_report(found))
        assert all(x <= BOUND for x in told)
    assert said == {"faster", "slower", "none", "noise"}
