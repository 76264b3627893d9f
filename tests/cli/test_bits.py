"""`prune --bits`: what is trained around is packed, what is written is cut from the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Run

pytest.importorskip("bitsandbytes")


def test_the_command_line_packs_resumes_and_tells(
    run: Run, tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 8,
    }  # multiples of 64 inputs
    tiny_model("llama", vocab_size=300, **sizes).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the student learns from teacher number {i}" for i in range(900)))
    command = ["prune", tmp_path / "model", "--sparsity", "0.2,0.3", "--data", text, "--steps", "4"]
    command += ["--length", "16", "--batch-size", "2", "--neuron-multiple", "4", "--bits", "4"]
    command += ["--set", "calibration_blocks=4", "--set", "compensation_blocks=4"]
    command += ["--set", "save_steps=2", "--device", "cpu"]
    for name in ("a", "b"):
        code, out, err = run(*command, "--out", tmp_path / name)
        assert code == 0, err
    assert "projections held in 4 bits" in out
    assert run(*command, "--out", tmp_path / "b", "--resume")[0] == 0
    for target in ("sparsity-0.2", "sparsity-0.3"):
        record = json.loads((tmp_path / "a" / target / "nuteprune.json").read_text())
        assert record["config"]["bits"] == 4
        assert record["sparsity"] >= record["target"]
        weights = [(tmp_path / x / target / "model.safetensors").read_bytes() for x in "ab"]
        assert weights[0] == weights[1]
