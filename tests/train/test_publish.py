"""What is pushed to the hub, with a hub that is a folder."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from transformers import PrinterCallback

from nuteprune import NutePruneConfig, NutePruneTrainer, UserError, load_pruned
from nuteprune.data.training_text import BlockDataset
from nuteprune.files import damage
from nuteprune.train.config import RecoverConfig
from nuteprune.train.publish import PushesCheckpoint
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
    """The folder that holds what was pushed; `asked.jsonl` in it says how."""
    folder = tmp_path / "hub"
    folder.mkdir()

    def note(**asked: Any) -> None:
        with (folder / "asked.jsonl").open("a") as file:
            file.write(json.dumps(asked) + "\n")

    def create_repo(self: HfApi, repo_id: str, **how: Any) -> RepoUrl:
        note(repo=repo_id, private=how.get("private"), token=self.token or how.get("token"))
        owned = repo_id if "/" in repo_id else f"me/{repo_id}"
        return RepoUrl(f"https://huggingface.co/{owned}")

    def put(repo_id: str, name: str, content: bytes) -> None:
        path = folder / repo_id / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def commit(repo_id: str, how: dict[str, Any]) -> CommitInfo:
        note(commit=how.get("commit_message"), revision=how.get("revision"))
        url = f"https://huggingface.co/{repo_id}/commit/0"
        return CommitInfo(
            commit_url=url, commit_message="", commit_description="", oid="0", _endpoint=None
        )

    def create_commit(self: HfApi, repo_id: str, operations: Any, **how: Any) -> CommitInfo:
        for operation in operations:
            with operation.as_file() as file:
                put(repo_id, operation.path_in_repo, file.read())
        return commit(repo_id, how)

    def upload_folder(
        self: HfApi, repo_id: str, folder_path: Path, ignore_patterns: list[str], **how: Any
    ) -> CommitInfo | Future[CommitInfo]:
        names = [
            x.relative_to(folder_path).as_posix() for x in folder_path.rglob("*") if x.is_file()
        ]
        there = [x.name for x in (folder / repo_id).glob("*")]
        for name in filter_repo_objects(there, allow_patterns=how.pop("delete_patterns")):
            (folder / repo_id / name).unlink()
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            put(repo_id, name, (folder_path / name).read_bytes())
        made = commit(repo_id, how)
        if not how["run_as_future"]:
            return made
        future: Future[CommitInfo] = Future()
        future.set_result(made)
        return future

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return folder


def asked(hub: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (hub / "asked.jsonl").read_text().splitlines()]


def pruned(model: Any, tokenizer: Any, run: Path, **settings: Any) -> NutePruneTrainer:
    args = NutePruneConfig(
        output_dir=str(run),
        target_sparsity=0.3,
        max_steps=2,
        per_device_train_batch_size=2,
        neuron_multiple=4,
        calibration_blocks=2,
        refit=False,
        save_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    random = torch.Generator().manual_seed(0)
    blocks = BlockDataset(torch.randint(3, 90, (8, 12), generator=random))
    trainer = NutePruneTrainer(model, args, blocks, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def as_a_stranger(folder: Path, shapes: str) -> tuple[str, float]:
    done = python("-c", STRANGER, folder, shapes)
    assert done.code == 0, done.err[-2000:]
    name, total = done.out.split()
    return name, float(total)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["free", "uniform"])
def test_the_trainer_pushes_the_whole_checkpoint_and_nothing_of_the_run(
    shapes: str, tiny_model, tiny_tokenizer, tmp_path: Path, hub: Path
) -> None:
    out = tmp_path / "small"
    trainer = pruned(
        tiny_model("llama", vocab_size=300),
        tiny_tokenizer,
        out / "run",
        shapes=shapes,
        push_to_hub=True,
        hub_model_id="somebody/small",
        hub_token="secret",
        hub_private_repo=True,
    )
    with pytest.raises(UserError, match=r"finalize\(\), then save_pruned"):
        trainer.push_to_hub()
    assert not list(hub.iterdir())  # nothing in the middle of the run, though it saved twice
    small = trainer.finalize()
    trainer.save_pruned(out)
    (out / "run" / "plots").mkdir()
    (out / "run" / "plots" / "loss.png").write_bytes(b"png")
    (hub / "somebody" / "small").mkdir(parents=True)
    stale = hub / "somebody" / "small" / "model-00001-of-00002.safetensors"
    stale.write_bytes(b"of an earlier push")
    trainer.push_to_hub()

    there = hub / "somebody" / "small"
    names = {x.relative_to(there).as_posix() for x in there.rglob("*") if x.is_file()}
    here = {x.name for x in out.iterdir() if x.is_file()}
    assert names == here | {"run/plots/loss.png"}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert names >= {"nuteprune.json", "SHA256SUMS"}
    assert ("modeling_pruned.py" in names) == (shapes == "free")
    assert damage(there) is None
    assert asked(hub) == [
        {"repo": "somebody/small", "private": True, "token": "secret"},
        {"commit": "Add a pruned model", "revision": None},
    ]
    with torch.no_grad():
        expected = small(torch.arange(3, 12)[None]).logits.abs().sum().item()
    name, total = as_a_stranger(there, shapes)
    assert name == type(small).__name__
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_recovery_pushes_nothing_in_the_middle(
    tiny_model, tiny_tokenizer, tmp_path: Path, hub: Path
) -> None:
    settings: dict[str, Any] = {"push_to_hub": True, "hub_model_id": "somebody/small"}
    args = RecoverConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=2, save_steps=1, **settings
    )
    rows: Any = [{"input_ids": list(range(3, 12)), "labels": list(range(3, 12))}] * 8
    trainer = RecoverTrainer(tiny_model("llama"), args, rows, tiny_tokenizer)
    trainer.train()
    with pytest.raises(UserError, match=r"write what merge\(\) returns"):
        trainer.push_to_hub()
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


def test_a_folder_is_pushed_under_its_name(tmp_path: Path, hub: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    args = dict.fromkeys(("hub_model_id", "hub_token", "hub_revision", "hub_private_repo"))
    trainer: Any = SimpleNamespace(
        is_world_process_zero=lambda: True, saved=tmp_path / "tiny", args=SimpleNamespace(**args)
    )
    PushesCheckpoint.push_to_hub(trainer, "again", blocking=False, revision="v2").result()
    assert [x.name for x in (hub / "me" / "tiny").iterdir()] == ["config.json"]
    assert asked(hub) == [
        {"repo": "tiny", "private": None, "token": None},
        {"commit": "again", "revision": "v2"},
    ]
