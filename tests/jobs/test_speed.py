"""What a run that was asked to be fast measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nuteprune.console import Output
from nuteprune.data.specs import DEMO
from nuteprune.jobs import speed
from nuteprune.jobs.job import PruneJob


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
