"""What follows a run live: every figure of the method reaches the trackers that are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from tests.conftest import Run

EVERY_RUN = {"loss", "learning_rate", "sparsity", "bad_steps"}
PROGRESSIVE = {"target", "teacher", "teachers"}
PARTS = {"token_kl", "layer"}
LAGRANGIAN = {"penalty", "lambda1", "lambda2"}
SIZE = ["--length", "24", "--batch-size", "2", "--steps", "6", "--sparsity", "0.3"]
PUBLISHED = [
    *("--set", "progressive=true", "--set", "gate_type=hard_concrete"),
    *("--set", "freeze_share=1.0"),  # from then on there is no penalty
]


class Tracker(TrainerCallback):
    """Keeps what it is told, as a tracker's callback would."""

    lines: list[dict[str, Any]] = []  # noqa: RUF012

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        self.lines.append(dict(logs))


def asked(model: Path, text: Path, out: Path, *more: Any) -> list[Any]:
    return ["prune", model, "--data", text, "--out", out, "--device", "cpu", *SIZE, *more]


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Tracker]:
    known = integration_utils.INTEGRATION_TO_CALLBACK
    monkeypatch.setitem(known, "of_test", Tracker)
    monkeypatch.setattr(Tracker, "lines", [])
    return Tracker


@pytest.mark.slow
@pytest.mark.parametrize("published", [False, True])
def test_trackers_see_what_the_method_does(
    published: bool,
    model: Path,
    text: Path,
    tmp_path: Path,
    run: Run,
    tracker: type[Tracker],
) -> None:
    out = tmp_path / "out"
    more = PUBLISHED if published else []
    code, _, stderr = run(*asked(model, text, out, "--set", "report_to=of_test", *more))
    assert code == 0, stderr
    steps = [line for line in tracker.lines if "loss" in line]
    assert len(steps) == 6
    expected = EVERY_RUN | PARTS | (PROGRESSIVE | LAGRANGIAN if published else set())
    assert all(expected <= set(line) for line in steps)
    assert all(isinstance(line[key], int | float) for line in steps for key in expected)
    # The same that the run keeps for itself, and that the parts of the loss are.
    kept = [json.loads(x) for x in (out / "run/metrics.jsonl").read_text().splitlines()]
    assert [{k: x[k] for k in expected} for x in steps] == [
        {k: x[k] for k in expected} for x in kept
    ]
    parts = PARTS | ({"penalty"} if published else set())
    for line in steps:
        assert line["loss"] == pytest.approx(sum(line[part] for part in parts), abs=1e-3)
    if not published:  # hard masks: what is expected is what comes out
        record = json.loads((out / "nuteprune.json").read_text())
        assert steps[-1]["sparsity"] == pytest.approx(record["sparsity"])


def test_recover_is_followed_too(
    model: Path, text: Path, tmp_path: Path, run: Run, tracker: type[Tracker]
) -> None:
    size = ["--length", "24", "--batch-size", "2", "--steps", "2", "--device", "cpu"]
    out = tmp_path / "out"
    code, _, stderr = run(
        *("recover", model, "--data", text, "--out", out, "--report-to", "of_test", *size)
    )
    assert code == 0, stderr
    assert sum({"loss", "learning_rate", "grad_norm"} <= set(x) for x in tracker.lines) == 2


@pytest.mark.parametrize("command", ["prune", "recover"])
def test_an_unknown_tracker_is_refused(
    command: str, model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    tracked = ["--report-to", "parchment"]
    share = ["--sparsity", "0.3", "--set", "report_to=parchment"] if command == "prune" else tracked
    named = ["--length", "24", "--steps", "2", "--device", "cpu"]
    code, _, stderr = run(command, model, "--data", text, "--out", out, *named, *share)
    assert (code, len(stderr.splitlines())) == (2, 1), stderr
    assert "parchment" in stderr
    assert not out.exists()


@pytest.mark.slow
def test_tensorboard_files_hold_the_curves(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    from tensorboard.backend.event_processing import event_accumulator as reader

    out = tmp_path / "out"
    code, _, stderr = run(*asked(model, text, out, "--set", "report_to=tensorboard", *PUBLISHED))
    assert code == 0, stderr
    (folder,) = {path.parent for path in out.rglob("events.out.tfevents.*")}
    events = reader.EventAccumulator(str(folder)).Reload()
    kept = [json.loads(x) for x in (out / "run/metrics.jsonl").read_text().splitlines()]
    for key in EVERY_RUN | PARTS | PROGRESSIVE | LAGRANGIAN:
        curve = [(e.step, e.value) for e in events.Scalars(f"train/{key}")]
        assert curve == [(x["step"], pytest.approx(x[key], rel=1e-5)) for x in kept]
