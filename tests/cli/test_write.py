"""Text of the model's own as a file: `write` leaves what a run would, `--own-text` takes it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nuteprune
from nuteprune.data import decoding
from nuteprune.errors import UserError
from nuteprune.files import writing
from tests.conftest import Run, json_of

from .conftest import TINY

HOW = ["--length", 24, "--device", "cpu", "--dtype", "float32"]


def pruning(model: Path, text: Path, out: Path, *more: Any) -> list[Any]:
    asked = ["prune", model, "--data", text, "--sparsity", 0.3, "--out", out, *TINY["prune"]]
    return [*asked, "--set", "neuron_multiple=4", *more]


def refused(run: Run, *words: Any) -> str:
    code, _, stderr = run(*words)
    said = [x for x in stderr.splitlines() if "it/s]" not in x]  # the bars of what a test saves
    assert (code, len(said)) == (2, 1), stderr
    return said[0]


@pytest.fixture(scope="module")
def own(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 tokens that the model has written, by the stage."""
    dense, tokenizer = (x.from_pretrained(model) for x in (AutoModelForCausalLM, AutoTokenizer))
    folder = tmp_path_factory.mktemp("own")
    nuteprune.write(dense, tokenizer, tokens=300, length=24, seed=5, folder=folder)
    return folder / "self.jsonl"


@pytest.mark.slow
def test_a_run_takes_the_bytes_that_it_would_have_written_itself(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, given, own = (tmp_path / x for x in ("alone", "given", "own.jsonl"))
    found = json_of(run, *pruning(model, text, alone))
    assert found["stages"]["write"]["seconds"] > 0
    json_of(run, "write", model, "--tokens", 1, "--out", own, *HOW)
    said = refused(run, *pruning(model, text, given, "--own-text", own))
    needed = int(re.search(r"write --tokens (\d+)$", said.strip())[1])  # type: ignore[index]
    again = json_of(run, "write", model, "--tokens", needed, "--out", own, *HOW, "--overwrite")
    written = (alone / "run" / "self.jsonl").read_bytes()
    assert own.read_bytes() == written
    rows = [json.loads(x) for x in written.splitlines()]
    assert (again["texts"], again["tokens"]) == (len(rows), sum(len(x["ids"]) for x in rows))

    monkeypatch.setattr("nuteprune.stages.write.write_batch", None)
    taken = json_of(run, *pruning(model, text, given, "--own-text", own))
    weights = [(x / "model.safetensors").read_bytes() for x in (given, alone)]
    assert weights[0] == weights[1]
    assert not (given / "run" / "self.jsonl").exists()
    assert "write" not in taken["stages"]
    assert taken["config"] == {**found["config"], "own_text": str(own)}
    assert len(taken["text"]["files"]) == len(found["text"]["files"]) + 16


@pytest.mark.slow
def test_a_run_is_gone_on_with_by_the_same_text_alone(
    model: Path, text: Path, own: Path, tmp_path: Path, run: Run
) -> None:
    """Written with another seed, and more of it than is read."""
    out, moved, other = (tmp_path / x for x in ("out", "moved.jsonl", "other.jsonl"))
    asked = pruning(model, text, out)
    json_of(run, *asked, "--own-text", own)
    settings = json.loads((out / "run" / "settings.json").read_text())
    assert settings["own_text"] == str(own)
    weights = (out / "model.safetensors").read_bytes()
    shutil.copy(own, moved)
    other.write_bytes(own.read_bytes() + own.read_bytes())
    assert "own_text_sha256" in refused(run, *asked, "--own-text", other, "--resume")
    assert "own_text_sha256" in refused(run, *asked, "--resume")
    code, said, stderr = run(*asked, "--own-text", moved, "--resume")
    assert code == 0, stderr
    assert re.search("^Resumed .*score", said, re.M)
    assert (out / "model.safetensors").read_bytes() == weights
    inside = out / "run" / "own.jsonl"
    shutil.copy(own, inside)
    said = refused(run, *asked, "--own-text", inside, "--overwrite")
    assert f"{inside}; name another folder" in said
    assert inside.exists()


@pytest.mark.slow
def test_neither_a_plan_nor_a_dry_run_counts_writing(
    model: Path, text: Path, own: Path, tmp_path: Path, run: Run
) -> None:
    dry = pruning(model, text, tmp_path / "out", "--dry-run")
    assert json_of(run, *dry)["seconds_writing"] > 0
    assert json_of(run, *dry, "--own-text", own)["seconds_writing"] == 0
    assert not (tmp_path / "out").exists()
    plan = ["plan", model, "--sparsity", 0.3, *TINY["plan"], "--set", "neuron_multiple=4"]
    for more, counted in ([], True), (["--own-text", own], False):
        phases = [x["phase"] for x in json_of(run, *plan, *more)["phases"]]
        assert ("write" in phases) == counted


def changed_model(folder: Path, change: Callable[[Any], None]) -> None:
    dense = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(dense)
    dense.save_pretrained(folder)


def test_text_of_another_model_or_tokenizer_is_refused(
    model: Path, text: Path, own: Path, tmp_path: Path, run: Run
) -> None:
    tuned, spelled = tmp_path / "tuned", tmp_path / "spelled"
    for folder in (tuned, spelled):
        shutil.copytree(model, folder)
    # As of a model that was tuned a little, and not in its last layer.
    changed_model(tuned, lambda x: x.model.layers[0].mlp.up_proj.weight[1].neg_())
    tokenizer = AutoTokenizer.from_pretrained(spelled)
    tokenizer.add_tokens(["Teacher"])
    tokenizer.save_pretrained(spelled)
    out = tmp_path / "out"
    for folder, what in ((tuned, "model"), (spelled, "tokenizer")):
        said = refused(run, *pruning(folder, text, out, "--own-text", own))
        assert f"{own} was written with another {what} than this run's" in said
        assert not out.exists()


def test_what_write_has_not_written_is_refused(
    model: Path, text: Path, own: Path, tmp_path: Path
) -> None:
    first, *rest = own.read_text().splitlines(keepends=True)
    row, file = json.loads(first), tmp_path / "bad.jsonl"
    how = {"data": str(text), "sparsity": 0.3, "out": tmp_path / "out", "quiet": True}
    how |= {"length": 24, "steps": 4, "dtype": "float32", "neuron_multiple": 4}
    bad = [{**row, "ids": x} for x in ([5, "6"], [5, -1], [300], "text", 7)]
    lines = [json.dumps(x) for x in (*bad, {"text": "mine"}, ["text"], row | {"batch": None})]
    for line in ["{", "\ud800", *lines[:-1]]:
        file.write_text(f"{first}{line}\n{''.join(rest)}", errors="surrogatepass")
        with pytest.raises(UserError, match=r"^line 2 of .*bad.jsonl is none that nuteprune"):
            nuteprune.prune(str(model), own_text=file, **how)
    for place, why in ((tmp_path, "Is a directory"), (tmp_path / "no", "No such file")):
        with pytest.raises(UserError, match=f"cannot read {place}: {why}"):
            nuteprune.prune(str(model), own_text=str(place), **how)
    with pytest.raises(UserError, match="--shares leaves no share for --own-text"):
        nuteprune.prune(str(model), own_text=str(own), shares=1, **how)
    assert not (tmp_path / "out").exists()


def test_stopped_on_its_way_the_command_goes_on(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "BATCH", 4)
    real, batches = decoding.write_batch, [0]

    def counted(*given: Any) -> Any:
        batches[0] += 1
        if batches[0] == 3:
            raise KeyboardInterrupt
        return real(*given)

    whole, own = tmp_path / "whole.jsonl", tmp_path / "own.jsonl"
    asked = ["write", model, "--tokens", 400, *HOW, "--out"]
    json_of(run, *asked, whole)
    monkeypatch.setattr("nuteprune.stages.write.write_batch", counted)
    assert run(*asked, own)[0] == 130
    assert not own.exists()
    json_of(run, *asked, own)
    assert own.read_bytes() == whole.read_bytes()
    last = json.loads(whole.read_text().splitlines()[-1])["batch"]
    assert batches[0] == last + 1 + 1  # each once, and that which was stopped
    assert sorted(x.name for x in tmp_path.iterdir()) == ["own.jsonl", "whole.jsonl"]


def test_a_disk_that_is_full_is_told_by_the_files_own_name(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        with writing("a hidden file"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nuteprune.stages.write._append", full)
    own = tmp_path / "own.jsonl"
    code, _, stderr = run("write", model, "--tokens", 20, "--out", own, *HOW)
    assert code == 1
    said = f"cannot write {own}: No space left on device; make room, then give the same command"
    assert said in stderr.splitlines()[-1]
    assert not own.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tokens", 0], "0 tokens to write"),
        (["--length", 2], "no room for text"),
        (["--length", 9999], "the model knows"),
        (["--dtype", "int8"], "dtype 'int8' is unknown"),
        (["--device", "abacus"], "device abacus is not here"),
        (["--out", "."], "is a folder"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    change: list[Any], message: str, model: Path, tmp_path: Path, run: Run, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["write", model, "--tokens", 20, "--out", "own.jsonl", *HOW, *change]
    assert message in refused(run, *words)
    assert not [*tmp_path.iterdir()]
