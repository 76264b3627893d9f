"""The command line called in this process, a tiny model and text for it."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from nuteprune.cli.app import main
from nuteprune.data import demo as assets
from nuteprune.model.families import FAMILIES
from nuteprune.model.family_file import to_text
from nuteprune.stages.judge import judge_beside
from tests.forked import workers
from tests.undrawn import leave_blank
from tests.unplanned import leave_unplanned


@pytest.fixture(autouse=True)
def workers_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that `bench` times need no interpreters of their own: tests/judge starts one."""
    contexts = SimpleNamespace(get_context=lambda _: workers())
    monkeypatch.setattr("nuteprune.judge.worker.multiprocessing", contexts)


@pytest.fixture(autouse=True)
def pictures_are_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """See tests/undrawn.py; test_report.py has a fixture of this name that does nothing."""
    leave_blank(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def phases_are_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """See tests/unplanned.py."""
    leave_unplanned(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def answers_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that ends, writing them at their usual length takes as long as training."""
    monkeypatch.setattr("nuteprune.run.judge_beside", partial(judge_beside, tokens=8))


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=300, tie_word_embeddings=True).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    documents = (f"Teacher {i} is less pruned than student {i + 1}. " * 6 for i in range(80))
    path.write_text("\n\n\n".join(documents))
    return path


TINY: dict[str, list[str]] = {
    "prune": [
        *("--steps", "4", "--length", "24", "--batch-size", "2"),
        *("--set", "calibration_blocks=2"),
        *("--set", "eval_blocks=2", "--device", "cpu", "--dtype", "float32"),
    ],
    "eval": ["--length", "24", "--blocks", "2", "--device", "cpu", "--dtype", "float32"],
    "bench": [
        *("--batch-sizes", "1", "--lengths", "4", "--new-tokens", "2", "--repeats", "1"),
        *("--device", "cpu", "--dtype", "float32"),
    ],
    "recover": [
        *("--steps", "2", "--length", "256", "--batch-size", "2"),
        *("--device", "cpu", "--dtype", "float32"),
    ],
    "export": [],
    "family": [],
    "inspect": [],
    "plan": ["--steps", "4", "--length", "24", "--batch-size", "2", "--tflops", "1"],
    "report": [],
    "vocab": [],
    "write": ["--tokens", "40", "--length", "24", "--device", "cpu", "--dtype", "float32"],
}
"""Command -> options that make it small; of an option that is given twice the last one counts."""
TINY["demo"] = TINY["prune"]


def sentences(count: int) -> list[str]:
    return [f"Teacher {i} is less pruned than student {i + 1}. " * 6 for i in range(count)]


@pytest.fixture(scope="session")
def workspace(tiny_model, tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands of the docs name, tiny: models called by their hub ids,
    texts, a pruned model (`small`, and with trainer checkpoints `out`), a recovered one (`better`),
    and a cache with the model `demo`.
    """
    folder = tmp_path_factory.mktemp("workspace")
    sizes = {"vocab_size": 300, "hidden_size": 128, "head_dim": 32, "intermediate_size": 512}
    sizes["max_position_embeddings"] = 512  # an instruction in its template, a byte a token
    models = {
        "Qwen/Qwen3-0.6B": "llama",
        "meta-llama/Llama-3.1-8B": "llama",
        "huggyllama/llama-7b": "llama_mha",
        "Qwen/Qwen3-8B": "qwen3",
        "MODEL": "llama",
        f"cache/{assets._MODEL_NAME}": "llama",
    }
    for name, family in models.items():
        tiny_model(family, **sizes).save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in sentences(80))
    for name in ("my_text.jsonl", "c4.jsonl"):
        (folder / name).write_text(rows)
    (folder / "asked.jsonl").write_text('{"prompt": "Is a teacher less pruned?"}\n')
    (folder / "DATA").mkdir()
    (folder / "DATA" / "text.txt").write_text("\n\n\n".join(sentences(80)))
    asked = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(60)]
    (folder / "alpaca.json").write_text(json.dumps(asked))
    (folder / "my_instructions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in asked))
    shutil.copytree(Path(__file__).parents[2] / "recipes", folder / "recipes")
    (folder / "family.yaml").write_text(to_text(FAMILIES["llama"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            "prune Qwen/Qwen3-0.6B --sparsity 0.2 --data my_text.jsonl --out small",
            "recover small --data my_text.jsonl --out better",
        ):
            words = command.split()
            patch.setattr(sys, "argv", ["nuteprune", *words, *TINY[words[0]]])
            with pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code
    shutil.copytree(folder / "small", folder / "PRUNED")
    return folder


@pytest.fixture
def in_workspace(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test: links to the workspace, and a `demo` that is tiny."""
    monkeypatch.chdir(tmp_path)
    for path in workspace.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(workspace / "cache"))
    texts = {name: sentences(80) for name in ("wikipedia", "speeches", "recipes")}
    monkeypatch.setattr(assets, "documents", lambda *_, **__: texts)
    return tmp_path
