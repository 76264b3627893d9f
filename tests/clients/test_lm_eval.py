"""Pruned checkpoints in lm-evaluation-harness, `--model hf`, on a local task."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nuteprune.export.checkpoint import save
from tests.greedy import continuation

pytestmark = pytest.mark.clients

TEXTS = ["the student learns", "a teacher that is", "little less pruned"]
STEPS = 6


@pytest.mark.parametrize("shapes", ["free", "uniform"])
def test_it_generates_what_transformers_does(
    shapes: str,
    tiny_model: Callable,
    tiny_tokenizer: Any,
    prune_at_random: Callable,
    python_of: Callable,
    client_environment: Callable,
    tmp_path: Path,
) -> None:
    model = prune_at_random(tiny_model("llama", vocab_size=300), ("kv_groups", "neurons"), shapes)
    assert model.config.model_type == ("pruned_llama" if shapes == "free" else "llama")
    save(model, tmp_path / "model", tiny_tokenizer)
    with (tmp_path / "texts.jsonl").open("w") as file:
        for text in TEXTS:
            tokens = torch.tensor([tiny_tokenizer(text).input_ids])
            made = continuation(model, tokens, STEPS, eos_token_id=None)[0]
            target = tiny_tokenizer.decode(made, skip_special_tokens=True)
            file.write(json.dumps({"text": text, "target": target}) + "\n")
    task = {
        "task": "greedy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["never in the text"], "max_gen_toks": STEPS},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "greedy.yaml").write_text(yaml.safe_dump(task))
    remote = ",trust_remote_code=True" if shapes == "free" else ""
    asked = {
        "--model": "hf",
        "--model_args": f"pretrained={tmp_path / 'model'},dtype=float32{remote}",
        "--tasks": "greedy",
        "--include_path": str(tmp_path),
        "--device": "cpu",
        "--output_path": str(tmp_path / "results"),
    }
    command = [str(python_of("lm-eval")), "-m", "lm_eval", *(x for kv in asked.items() for x in kv)]
    folders = {x: str(tmp_path / "cache") for x in ("HF_HOME", "HF_DATASETS_CACHE")}
    done = subprocess.run(
        command, env=client_environment(**folders), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "results").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["greedy"]["exact_match,none"] == 1.0
