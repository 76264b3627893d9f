"""What is pushed to the hub, with a hub that is a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, RepoUrl

from nuteprune import NutePruneConfig, NutePruneTrainer, UserError, load_pruned
from nuteprune.data.training_text import BlockDataset
from nuteprune.train.config import RecoverConfig
from nuteprune.train.recover import RecoverTrainer
from tests.forked import python

# Runs without nuteprune, on a copy of what was pushed.
STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "free")
assert not any(name.startswith("nuteprune") for name in sys.modules)
print(type(model).__name__, model(torch.arange(3, 12)[None]).logits.abs().sum().item())
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds what was pushed."""
    folder = tmp_path / "hub"
    folder.mkdir()

    def create_repo(self: HfApi, repo_id: str, **_: Any) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self: HfApi, repo_id: str, operations: Any, **_: Any) -> CommitInfo:
        for operation in operations:
            path = folder / repo_id / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())
        url = f"https://huggingface.co/{repo_id}/commit/0"
        return CommitInfo(
            commit_url=url, commit_message="", commit_description="", oid="0", _endpoint=None
        )

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return folder


def as_a_stranger(folder: Path, shapes: str) -> tuple[str, float]:
    done = python("-c", STRANGER, folder, shapes)
    assert done.code == 0, done.err[-2000:]
    name, total = done.out.split()
    return name, float(total)


def test_a_trainer_pushes_nothing(tiny_model, tmp_path: Path, hub: Path) -> None:
    folder = str(tmp_path / "run")
    for kind in (NutePruneConfig, RecoverConfig):
        with pytest.raises(UserError, match="push_to_hub would upload a run's state"):
            kind(output_dir=folder, use_cpu=True, push_to_hub=True)
    text = BlockDataset(torch.arange(3, 51).view(4, 12))
    trainer = NutePruneTrainer(
        tiny_model("llama"), NutePruneConfig(output_dir=folder, use_cpu=True), text
    )
    with pytest.raises(UserError, match=r"save_pruned\(FOLDER\), and upload that folder"):
        trainer.push_to_hub()
    rows: Any = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    args = RecoverConfig(output_dir=folder, use_cpu=True)
    with pytest.raises(UserError, match=r"write what merge\(\) returns"):
        RecoverTrainer(tiny_model("llama"), args, rows, None).push_to_hub()
    assert not list(hub.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["free", "uniform"])
def test_a_model_pushes_itself_as_transformers_models_do(
    shapes: str, tiny_model, prune_at_random, tmp_path: Path, hub: Path
) -> None:
    small = prune_at_random(tiny_model("qwen2"), ("kv_groups", "neurons"), shapes)
    small.push_to_hub("somebody/small")
    there = hub / "somebody" / "small"
    names = {x.name for x in there.iterdir()}
    assert small.config.model_type == ("pruned_qwen2" if shapes == "free" else "qwen2")
    code = {"modeling_pruned.py"} if shapes == "free" else set()
    stock = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert names == stock | code
    with torch.no_grad():
        expected = small(torch.arange(3, 12)[None]).logits
        loaded = load_pruned(there)(torch.arange(3, 12)[None]).logits
    assert torch.equal(loaded, expected)
    name, total = as_a_stranger(there, shapes)
    assert name == type(small).__name__
    assert total == pytest.approx(expected.abs().sum().item(), rel=1e-5)
