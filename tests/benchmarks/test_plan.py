"""benchmarks/plan.py, plan_tables.py: they count what is held, and say which plans are true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nuteprune.plan import phases
from tests.scripts import script

plan, tables = script("plan"), script("plan_tables")


def test_memory_counts_for_the_phase_that_it_is_held_in() -> None:
    before = [bytearray(2000) for _ in range(50_000)]
    pinned = bytearray(2000)  # the heap cannot shrink below it by itself
    del before
    watch = plan.Watch()
    with watch.phase("outer"):
        with watch.phase("inner"):
            held = torch.ones(10_000_000)
            watch._note()
            del held
        watch._note()
    assert 35e6 <= watch.peaks["inner"] < 60e6
    assert watch.peaks["outer"] < 30e6
    assert pinned


def test_a_plan_is_true_within_a_tenth_or_100_megabytes() -> None:
    assert plan.true(550e6, 460e6)
    assert plan.true(1.6e9, 1.5e9)
    assert not plan.true(1.8e9, 1.5e9)
    assert not plan.true(0, 101e6)


@pytest.mark.slow(seconds=8)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
def test_tables_of_large_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    small = {**tables.QWEN3, **sizes, "head_dim": 8, "intermediate_size": 192, "vocab_size": 300}
    monkeypatch.setitem(tables.CONFIGS, "small", small)
    monkeypatch.setattr(tables, "LENGTH", 16)
    monkeypatch.setattr(phases, "FEW_BLOCKS", (3, 6))
    tables.main(["--models", "small", "--json", str(tmp_path / "plans.json")])
    (found,) = json.loads((tmp_path / "plans.json").read_text())
    layer = 2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 192 + 2 * 64 + 2 * 8
    assert found["weights_bytes"] == 2 * (2 * layer + 2 * 300 * 64 + 64)
    columns = list(found["peak_bytes"])
    assert columns[0] == "as asked"
    assert [x.rpartition(", ")[2] for x in columns if "sharded" in x] == ["8 devices", "64 devices"]
    printed = capsys.readouterr().out
    assert all(f"| {phase} |" in printed for phase in found["flops"])
