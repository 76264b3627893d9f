"""Two processes through the real command line do the work of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def prune(launcher: list[str], model: Path, text: Path, out: Path, batch: int, **more: str) -> str:
    settings = [f"--set={k}={v}" for k, v in {**SETTINGS, **more}.items()]
    command = [*launcher, "-m", "nuteprune.cli", "prune", str(model), "--data", str(text)]
    command += [*OPTIONS, "--batch-size", str(batch), *settings, "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("gate_type", ["ranked", "hard_concrete"])
def test_two_processes_of_batch_4_are_one_of_batch_8(
    gate_type: str, tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    folder, text = tmp_path / "model", tmp_path / "text.jsonl"
    tiny_model("llama", vocab_size=512).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    words = [chr(97 + int(i)) for i in torch.randint(0, 26, (6000,), generator=random)]
    documents = ["".join(words[i : i + 60]) for i in range(0, 6000, 60)]
    text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    python = [sys.executable]
    torchrun = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    prune(python, folder, text, tmp_path / "one", 8, gate_type=gate_type)
    said = prune(torchrun, folder, text, tmp_path / "two", 4, gate_type=gate_type)
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
        one, two = (load_pruned(tmp_path / x)(tokens).logits for x in ("one", "two"))
    assert torch.allclose(one, two, atol=1e-3 * float(one.abs().max()))
