from __future__ import annotations

from pathlib import Path

import torch

from nuteprune.export.loading import load_pruned
from nuteprune.jobs import recover
from nuteprune.jobs.job import STEPS, TEXT, RecoverJob


def test_float16_is_not_rounded_to_bfloat16(tiny_inputs: tuple[Path, Path], tmp_path: Path) -> None:
    half = load_pruned(tiny_inputs[0], dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    job = RecoverJob(str(tmp_path / "half"), tmp_path / "out", device="cpu", dtype="bfloat16")
    loaded, autocast = recover._load(job)
    assert autocast["bf16"]
    for ours, theirs in zip(loaded.parameters(), half.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_learns_from_what_all_its_passes_read(tmp_path: Path) -> None:
    job = RecoverJob("model", tmp_path, device="cpu", batch_size=2, accumulation=3)
    config = recover._config(job, TEXT)
    assert (config.sequences_per_step, config.max_steps) == (6, STEPS)
