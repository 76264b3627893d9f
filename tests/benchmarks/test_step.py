"""benchmarks/step.py on a tiny model: rows do what they say; figures are never judged here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.forked import piped, python
from tests.scripts import script

rows, step = (script(x) for x in ("step_rows", "step"))


@pytest.fixture
def folder(tiny_model, tmp_path: Path) -> Path:
    # So many neurons that half of the model can go in the usual multiples of 32.
    tiny_model("llama", intermediate_size=192).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_all_kinds_of_distillation_have_one_loss(folder: Path) -> None:
    """Two plain passes, two models and co-forward: over several steps, LoRA and masks moving."""
    cell = rows.Cell(str(folder), batch_size=2, length=8, rank=2)
    losses = {}
    for name in ("nuteprune", "ramp", "two_pass", "two_model"):
        row = rows.ROWS[name](cell)
        losses[name] = []
        for _ in range(3):
            losses[name].append(float(row.backward()))
            row.update()
    assert losses["two_pass"] == pytest.approx(losses["nuteprune"], rel=1e-4)
    assert losses["two_model"] == pytest.approx(losses["nuteprune"], rel=1e-4)
    assert losses["ramp"][0] == pytest.approx(losses["nuteprune"][0], rel=1e-4)
    assert len(set(losses["nuteprune"])) == 3


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_compute_in_the_dtype_asked_for(folder: Path, autocast: bool) -> None:
    cell = rows.Cell(str(folder), 2, 8, rank=2, dtype="bfloat16", autocast=autocast)
    seen: set[torch.dtype] = set()

    def note(module: Any, _: Any, output: torch.Tensor) -> None:
        if module.out_features == 2:
            seen.add(output.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, x, y: note(module, x, y) if hasattr(module, "out_features") else None
    )
    try:
        rows.ROWS["lora"](cell).backward()
    finally:
        handle.remove()
    assert seen == {torch.bfloat16 if autocast else torch.float32}


@pytest.mark.slow
def test_a_run_ends_with_one_line_and_no_noise(
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    python("-c", "")  # starts the server, whose libraries may say something
    capfd.readouterr()
    started: list[Any] = []

    def start(parts: list[str], **pipes: Any) -> Any:
        """Start the first row as it is, which tells what an interpreter of its own says."""
        started.append(piped(parts) if started else subprocess.Popen(parts, **pipes))
        return started[-1]

    monkeypatch.setattr(step, "subprocess", SimpleNamespace(PIPE=subprocess.PIPE, Popen=start))
    sizes = ["--batch-size", "2", "--length", "8", "--rank", "2", "--device", "cpu"]
    sweep = ["--sweep", "--lengths", "4", "--batch-sizes", "--vocabularies", "--sweep-repeats", "1"]
    out = tmp_path / "step.json"
    options = [*sizes, *sweep, "--dtype", "float32", "--repeats", "1", "--json", str(out)]
    step.main(["--model", str(folder), *options])
    said = capfd.readouterr()
    assert said.err == ""
    line = said.out.splitlines()[-1]
    assert out.read_text() == line + "\n"
    told = json.loads(line)
    assert len(set(told["trained_parameters"].values())) == 1  # the same adapters in all
    for what in ("time", "memory"):
        figures = (
            told["memory_bytes"]
            if what == "memory"
            else {row: seconds[0] for row, seconds in told["seconds"].items()}
        )
        for other in ("lora", "two_pass"):
            expected = figures["nuteprune"] / figures[other]
            assert told[f"ratio_{what}_to_{other}"] == pytest.approx(expected)
        assert told[f"ratio_{what}_teachers"] == pytest.approx(
            figures["teachers"] / figures["ramp"]
        )
    assert [x["cell"] for x in told["sweep"]] == ["length 4"]
    assert len(started) == len(rows.ROWS) + len(step.SWEEP_ROWS)
    speed, seconds = told["sweep"][0]["tokens_per_second"], told["sweep"][0]["seconds"]
    assert speed["lora"] == pytest.approx(2 * 4 / seconds["lora"][0])
