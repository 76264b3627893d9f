"""What a run that was asked to be fast measures."""

from __future__ import annotations

import time
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
    monkeypatch.setattr(speed, "write_extra", lambda *_: None)
    monkeypatch.setattr(speed, "for_report", lambda _: {})
    monkeypatch.setattr(speed, "told", lambda _: "")
    asked = {"kind": "speedup", "value": 1.3, "for": "decode", "at": "1x256+32"}
    speed.judge_speed(
        PruneJob(DEMO, Path(DEMO)), {Path(DEMO): {"asked": asked}}, Output(quiet=True)
    )
    assert timed == [[str(tmp_path / DEMO), DEMO]]


def test_a_table_of_costs_is_of_one_machine(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path))
    made: list[Path] = []

    def write_table(path: Path, *_: Any) -> dict[str, Any]:
        path.write_text("{}")
        made.append(path)
        return {}

    monkeypatch.setattr(speed, "write_table", write_table)
    asked = {"target_speedup": "1.3", "speed_at": "1x8+4", "use_cpu": True}
    config = NutePruneConfig(output_dir=str(tmp_path / "run"), **asked)
    job = PruneJob(DEMO, tmp_path / "out", device="cpu", dtype="float32")
    model = tiny_model("llama")
    for name in ("this", "this", "that"):
        monkeypatch.setattr("platform.node", lambda name=name: name)
        with Output(quiet=True).bars() as bars:
            speed.costs_for(job, config, model, bars)
    assert len(made) == len(set(made)) == 2


def test_two_runs_at_once_measure_one_table_of_costs(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path))
    made: list[Path] = []

    def write_table(path: Path, *_: Any) -> dict[str, Any]:
        made.append(path)
        time.sleep(0.3)  # while the other one asks
        path.write_text("{}")
        return {}

    monkeypatch.setattr(speed, "write_table", write_table)
    monkeypatch.setattr(speed, "read_table", lambda _: {})
    asked = {"target_speedup": "1.3", "speed_at": "1x8+4", "use_cpu": True}
    config = NutePruneConfig(output_dir=str(tmp_path / "run"), **asked)
    job = PruneJob(DEMO, tmp_path / "out", device="cpu", dtype="float32")
    model = tiny_model("llama")
    with Output(quiet=True).bars() as bars, ThreadPoolExecutor(2) as runs:
        both = [runs.submit(speed.costs_for, job, config, model, bars) for _ in range(2)]
    assert [run.result() for run in both] == [{}, {}]
    assert len(made) == 1
