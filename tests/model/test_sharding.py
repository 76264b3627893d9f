"""Base weights sharded over two real processes: the step is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import python

pytestmark = pytest.mark.slow(10)

SCRIPT = Path(__file__).with_name("sharded_step.py")


def step(model: Path, out: Path, processes: int, how: str, checkpointing: bool) -> dict[str, Any]:
    done = python(SCRIPT, model, out, how, int(checkpointing), processes=processes)
    assert done.code == 0, done.err
    return torch.load(out)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("llama_mha", False), ("gemma2", True), ("mixtral", True)],
    ids=["tied", "softcap and checkpointing", "experts and checkpointing"],
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
