"""Real processes through the command line: two do the work of one; signals stop in good order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune import load_pruned

OPTIONS = ["--sparsity", "0.3", "--length", "16", "--device", "cpu", "--dtype", "float32"]
SETTINGS = {
    "max_steps": 6,
    "neuron_multiple": 4,
    "calibration_blocks": 8,
    "compensation_blocks": 8,
    "save_steps": 3,
    "logging_steps": 1,
}


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(launcher: list[str], inputs: tuple[Path, Path], out: Path, **more: Any) -> list[str]:
    settings = [f"--set={k}={v}" for k, v in {**SETTINGS, **more}.items()]
    model, text = inputs
    parts = [*launcher, "-m", "nuteprune.cli", "prune", str(model), "--data", str(text)]
    return [*parts, *OPTIONS, *settings, "--out", str(out)]


def run(parts: list[str]) -> str:
    done = subprocess.run(parts, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("gates", "shared"),
    [
        ({"gate_type": "ranked"}, {}),
        ({"gate_type": "hard_concrete"}, {}),
        ({"gate_type": "hard_concrete", "solved_schedule": False}, {}),
        ({"gate_type": "ranked"}, {"sharded": True}),
        (
            {"gate_type": "ranked", "ramp_share": 0.5, "gradient_checkpointing": True},
            {"sharded": True},
        ),
        ({"gate_type": "deterministic", "solved_schedule": False}, {"sharded": True}),
        ({"method": "wanda", "compensation": "finalize"}, {"sharded": True}),
    ],
    ids=lambda settings: "-".join(str(v) for v in settings.values()) or "whole",
)
def test_two_processes_of_batch_4_are_one_of_batch_8(
    gates: dict[str, Any],
    shared: dict[str, Any],
    tiny_inputs: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    python = [sys.executable]
    torchrun = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    # With the usual epsilon Adam divides rounding by rounding where gradients are near zero, and
    # hides a gradient of the wrong size everywhere else.
    same = {**gates, "adam_epsilon": 1e-2}
    run(command(python, tiny_inputs, one, batch_size=8, **same))
    said = run(command(torchrun, tiny_inputs, two, batch_size=4, **same, **shared))
    assert said.count("Saved") == 1
    records = [json.loads((tmp_path / x / "nuteprune.json").read_text()) for x in ("one", "two")]
    assert records[0]["layers"] == records[1]["layers"]
    losses = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for path in (tmp_path / x / "run" / "metrics.jsonl" for x in ("one", "two"))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        ours, theirs = (load_pruned(x)(tokens).logits for x in (one, two))
    assert torch.allclose(ours, theirs, atol=1e-3 * float(ours.abs().max()))


def test_weights_are_shared_out_by_the_trainer(
    tiny_inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    script = Path(__file__).parent / "train" / "sharded_run.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run([*torchrun, "--nproc_per_node", "2", str(script), str(tiny_inputs[0]), str(tmp_path)])
    assert load_pruned(tmp_path / "small").config.num_hidden_layers == 3


def test_two_processes_score_and_freeze_together_where_nothing_is_trained(
    tiny_inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    python = [sys.executable]
    torchrun = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(command(torchrun, tiny_inputs, two, batch_size=4, max_steps=0)).count("Saved") == 1
    run(command(python, tiny_inputs, one, batch_size=4, max_steps=0))
    layers = [json.loads((x / "nuteprune.json").read_text())["layers"] for x in (one, two)]
    assert layers[0] == layers[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resume_ends_as_if_never_interrupted(
    number: int, tiny_inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    python = [sys.executable]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    long = {"batch_size": 2, "max_steps": 40, "save_steps": 1000}
    run(command(python, tiny_inputs, whole, **long))
    parts = command(python, tiny_inputs, cut, **long)
    with subprocess.Popen(parts, env=ENV, stderr=subprocess.PIPE, text=True) as process:
        metrics = cut / "run" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        errors = process.communicate()[1]
    assert process.returncode == 128 + number
    assert "which is saved; go on with the same command and --resume" in errors
    assert not (cut / "config.json").exists()
    run([*parts, "--resume"])
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (x / "run/metrics.jsonl").read_text().splitlines()]
        for x in (whole, cut)
    ]
    assert len(losses[0]) == 40
    assert losses[0] == losses[1]
