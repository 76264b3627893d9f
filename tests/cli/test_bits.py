"""`prune --bits`: what is trained around is packed, what is written is cut from the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from nuteprune.stages.judge import judge
from tests.conftest import Run


@pytest.mark.slow
def test_the_command_line_packs_resumes_and_tells(
    run: Run, tiny_model, tiny_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judging = Mock(wraps=judge)
    monkeypatch.setattr("nuteprune.run.judge", judging)
    # Multiples of 64 inputs in each projection.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
    tiny_model("llama", vocab_size=300, **sizes).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the student learns from teacher number {i}" for i in range(900)))
    command = ["prune", tmp_path / "model", "--sparsity", "0.2,0.3", "--data", text, "--steps", "4"]
    command += ["--length", "16", "--batch-size", "2", "--set", "neuron_multiple=4"]
    command += ["--set", "calibration_blocks=4"]
    command += ["--set", "save_steps=3", "--device", "cpu", "--out"]

    def outcome(name: str, target: str) -> tuple[dict[str, Any], bytes]:
        folder = tmp_path / name / target
        record = json.loads((folder / "nuteprune.json").read_text())
        return record, (folder / "model.safetensors").read_bytes()

    for name, bits in (("whole", ()), ("packed", ("--bits", "4")), ("cut off", ("--bits", "4"))):
        code, out, err = run(*command, tmp_path / name, *bits)
        assert code == 0, err
        judged = [call.kwargs["name"] for call in judging.call_args_list]
        assert judged == ["the dense model", *["the pruned model"] * 2]
        judging.reset_mock()
        assert ("projections held in 4 bits" in out) == bool(bits)
    # The whole model's text is of the packed one too.
    written = ["--own-text", tmp_path / "whole/run/self.jsonl", "--dry-run"]
    code, _, err = run(*command, tmp_path / "new", "--bits", "4", *written)
    assert code == 0, err
    shutil.rmtree(tmp_path / "cut off/sparsity-0.3/run/checkpoint-4")  # goes on from step 3
    assert run(*command, tmp_path / "cut off", "--bits", "4", "--resume")[0] == 0
    for target in ("sparsity-0.2", "sparsity-0.3"):
        record, weights = outcome("packed", target)
        assert record["config"]["bits"] == 4
        assert record["sparsity"] >= record["target"]
        assert outcome("cut off", target)[1] == weights
        whole, other_weights = outcome("whole", target)
        assert other_weights != weights
        # Judged is the model, not its copy in 4 bits.
        assert record["perplexity"]["before"] == whole["perplexity"]["before"]
