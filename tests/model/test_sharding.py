"""Base weights sharded over two real processes: the step is that of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("sharded_step.py")


def step(model: Path, out: Path, processes: int, how: str, checkpointing: bool) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, SCRIPT, model, out, how, str(int(checkpointing))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("llama_mha", False), ("gemma2", True)],
    ids=["tied", "softcap and checkpointing"],
)
def test_sharded_is_replicated_is_one_process(
    tiny_model, name: str, checkpointing: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny_model(name).save_pretrained(folder)
    one = step(folder, tmp_path / "one", 1, "whole", checkpointing)
    assert all(float(g.abs().max()) > 0 for g in one["gradients"])
    for how in ("whole", "sharded"):
        two = step(folder, tmp_path / how, 2, how, checkpointing)
        torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
        for ours, expected in zip(two["gradients"], one["gradients"], strict=True):
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * scale)
