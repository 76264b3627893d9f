"""What a run that was asked to be fast measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nuteprune.console import Output
from nuteprune.data.specs import DEMO
from nuteprune.jobs import speed
from nuteprune.jobs.job import PruneJob
from nuteprune.train.config import NutePruneConfig


def test_a_folder_that_is_called_demo_is_no_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ratio = {"low": 1.2, "high": 1.4, "median": 1.3, "bound": 1.5, "verdict": "1.30 x"}
    timed: list[list[str]] = []

    def measure(names: list[str], *_: Any) -> dict[str, Any]:
        timed.append(names)
        return {"settings": [{"speedup": {"decode": ratio}}]}

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "write_speed", lambda *_: None)
    asked = {"kind": "speedup", "value": 1.3, "for": "decode", "at": "1x256+32"}
    speed.judge_speed(
        PruneJob(DEMO, Path(DEMO)), {Path(DEMO): {"asked": asked}}, Output(quiet=True)
    )
    assert timed == [[str(tmp_path / DEMO), DEMO]]


@pytest.fixture
def asks(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[], Any], list[Path]]:
    """Ask for the table of costs of one run, and say which files were measured for it."""
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path / "cache"))
    measured: list[Path] = []

    def write_table(path: Path, *_: Any) -> None:
        measured.append(path)
        time.sleep(0.1)  # while another run asks
        path.write_text("{}")

    monkeypatch.setattr(speed, "write_table", write_table)
    asked = {"target_speedup": "1.3@1x8+4", "use_cpu": True}
    config = NutePruneConfig(output_dir=str(tmp_path / "run"), **asked)
    job = PruneJob(DEMO, tmp_path / "out", device="cpu", dtype="float32")
    model = tiny_model("llama")

    def ask() -> Any:
        with Output(quiet=True).bars() as bars:
            return speed.costs_for(job, config, model, bars)

    return ask, measured


def test_a_table_of_costs_is_of_one_machine(asks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, measured = asks
    for name in ("this", "this", "that"):
        monkeypatch.setattr("platform.node", lambda name=name: name)
        ask()
    assert len(measured) == len(set(measured)) == 2


def test_two_runs_at_once_measure_one_table_of_costs(asks: Any) -> None:
    ask, measured = asks
    with ThreadPoolExecutor(2) as runs:
        both = [runs.submit(ask) for _ in range(2)]
    assert [run.result() for run in both] == [{}, {}]
    assert len(measured) == 1


def test_a_table_that_is_there_is_read_from_a_cache_that_cannot_be_written(
    asks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, measured = asks
    ask()
    monkeypatch.setattr(speed, "FileLock", lambda path: pytest.fail(f"writes {path}"))
    assert ask() == {}
    assert len(measured) == 1
