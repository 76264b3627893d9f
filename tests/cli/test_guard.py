"""What commands write over what is there, over what they read, and where there is no room."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from nuteprune.cli.app import make_app
from nuteprune.model.families import FAMILIES
from nuteprune.model.family_file import to_text
from tests.conftest import Run

from .conftest import TINY

WRITERS = ("export", "bench", "bench --save", "family", "write")
OPTIONS = {"--out", "--save", "--save-costs"}
"""What names what is written, in any command."""


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A model, as the output folder of a run."""
    folder = tmp_path / "OUT"
    shutil.copytree(model, folder)
    (folder / "run").mkdir()
    return folder


def command(writer: str, folder: Path, file: Path) -> list[Any]:
    """Return the words that let a command read a folder and write a file."""
    if writer == "export":
        return ["export", folder, "--to", "gguf", "--out", file]
    if writer == "bench":
        return ["bench", folder, *TINY["bench"], "--save-costs", file]
    if writer == "write":
        return ["write", folder, *TINY["write"], "--out", file]
    if writer == "family":
        return ["family", folder, "--out", file]
    file.unlink(missing_ok=True)
    return ["bench", folder, *TINY["bench"], "--against", folder.parent / "dense", "--save"]


def test_what_writes_can_be_told_to_overwrite_and_has_no_name_of_what_reads() -> None:
    commands = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]
    options = {k: {x for p in c.params for x in p.opts} for k, c in commands.items()}
    writers = {name for name, known in options.items() if known & OPTIONS}
    assert writers == {
        *("prune", "demo", "recover", "vocab", "export", "bench", "family", "write"),
    }
    assert all("--overwrite" in options[name] for name in writers)
    assert {name for name, known in options.items() if "--costs" in known} == {
        *("prune", "demo", "plan"),
    }


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_there_is_not_written_over_unasked(writer: str, folder: Path, run: Run) -> None:
    shutil.copytree(folder, folder.parent / "dense")
    file = folder.parent / "mine.txt"
    asked = command(writer, folder, file)
    if writer == "bench --save":
        file = folder / "run" / "speed.json"
    file.write_text("mine")
    code, _, stderr = run(*asked)
    assert (code, f"{file} exists; pass --overwrite to replace it" in stderr) == (2, True), stderr
    assert file.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_there_is_written_over_when_that_is_asked_for(
    writer: str, folder: Path, run: Run
) -> None:
    shutil.copytree(folder, folder.parent / "dense")
    file = folder.parent / "mine.txt"
    asked = command(writer, folder, file)
    if writer == "bench --save":
        file = folder / "run" / "speed.json"
    file.write_text("mine")
    code, _, stderr = run(*asked, "--overwrite")
    assert (code, file.read_bytes() == b"mine") == (0, False), stderr


@pytest.mark.parametrize("writer", ["export", "bench", "family", "write"])
@pytest.mark.parametrize("place", ["in the folder", "linked to", "linked from"])
def test_the_model_that_is_read_is_not_written_over(
    writer: str, place: str, folder: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "snapshots").mkdir()  # whose links the hub's cache makes
    folder = folder.rename(tmp_path / "snapshots" / "1")
    weights, file = folder / "model.safetensors", folder / "model.safetensors"
    whole = weights.read_bytes()
    if place == "linked to":
        (file := tmp_path / "beside").symlink_to(weights)
    elif place == "linked from":
        (tmp_path / "blobs").mkdir()
        file = weights.rename(tmp_path / "blobs" / "1")
        weights.symlink_to(file)
    code, _, stderr = run(*command(writer, folder, file), "--overwrite")
    assert (code, len(stderr.splitlines())) == (2, 1), stderr
    assert f"belongs to the model {folder}, which would be lost" in stderr
    assert weights.read_bytes() == file.read_bytes() == whole


def test_an_earlier_export_in_the_models_folder_is_none_of_its_files(
    folder: Path, run: Run
) -> None:
    asked = command("export", folder, folder / "model.gguf")
    for more in ([], ["--overwrite"]):
        code, _, stderr = run(*asked, *more)
        assert code == 0, stderr


@pytest.mark.parametrize("writer", ["export", "bench", "family"])
def test_an_entry_that_is_read_is_not_written_over(writer: str, folder: Path, run: Run) -> None:
    entry = folder.parent / "entry.yaml"
    entry.write_text(text := to_text(FAMILIES["llama"]))
    code, _, stderr = run(*command(writer, folder, entry), "--family", entry, "--overwrite")
    assert (code, f"belongs to the entry {entry}" in stderr) == (2, True), stderr
    assert entry.read_text() == text


def test_weights_of_a_graph_that_was_moved_away_are_kept(folder: Path, run: Run) -> None:
    out = folder.parent / "m.onnx"
    data = folder.parent / "m.onnx.01234567.data"
    data.write_bytes(b"of the graph that was moved")
    code, _, stderr = run("export", folder, "--to", "onnx", "--out", out)
    assert (code, f"{data} exists; pass --overwrite" in stderr) == (2, True), stderr
    assert data.exists()


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, 1), (errno.EROFS, 2), (errno.EACCES, 2)]
)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_takes_nothing_is_met_before_the_work(
    writer: str,
    number: int,
    expected: int,
    folder: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(folder, folder.parent / "dense")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    def work(*_: object, **__: object) -> None:
        pytest.fail("the work has begun")

    file = folder.parent / "new" / "file"
    asked = command(writer, folder, file)
    if writer == "bench --save":
        file = folder / "run" / "speed.json"
    monkeypatch.setattr("nuteprune.jobs.guard.tempfile.TemporaryFile", refuse)
    for place in ("jobs.sources.load_model", "jobs.bench.load_model", "jobs.bench.measure"):
        monkeypatch.setattr(f"nuteprune.{place}", work)
    monkeypatch.setattr("nuteprune.jobs.family.checked", work)
    monkeypatch.setattr("nuteprune.jobs.write.load_model", work)
    code, _, stderr = run(*asked)
    assert (code, len(stderr.splitlines())) == (expected, 1), stderr
    assert f"cannot write {asked[-2] if file in asked else '--save'} {file}: " in stderr
    assert os.strerror(number) in stderr
    assert not file.parent.exists() or writer == "bench --save"


def test_a_disk_that_is_full_in_the_end_is_told_by_the_users_name(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(partial: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))

    monkeypatch.setattr("nuteprune.files.sync", full)
    for writer in ("export", "bench"):
        file = folder.parent / f"{writer}.file"
        code, _, stderr = run(*command(writer, folder, file))
        assert code == 1
        last = stderr.splitlines()[-1]
        assert f"cannot write {file}: No space left on device; make room" in last
        assert ".partial" not in last
    assert not [x for x in folder.parent.iterdir() if x.is_file()]


def test_a_file_for_which_there_is_no_room_is_not_begun(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)._replace(free=10_000)
    monkeypatch.setattr("nuteprune.files.shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr("nuteprune.export.gguf.write._write", None)
    file = folder.parent / "m.gguf"
    code, _, stderr = run(*command("export", folder, file))
    assert (code, f"cannot write {file}: it takes " in stderr) == (1, True), stderr
    assert "and 10,000 are free there; make room" in stderr


NAMES = ["with space", "two\nlines", "n" * 250 + ".file", "ü" * 127]


@pytest.mark.parametrize("name", NAMES, ids=["space", "newline", "255 bytes", "254 bytes"])
@pytest.mark.parametrize("writer", ["export", "bench", "write"])
def test_files_of_any_name_are_written(writer: str, name: str, folder: Path, run: Run) -> None:
    file = folder.parent / name
    code, _, stderr = run(*command(writer, folder, file))
    assert code == 0, stderr
    assert sorted(x.name for x in folder.parent.iterdir()) == sorted(["OUT", name])


@pytest.mark.parametrize("writer", ["export", "bench", "family", "write"])
def test_a_name_that_is_too_long_is_told_before_the_work(
    writer: str, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nuteprune.jobs.sources.read_config", None)
    monkeypatch.setattr("nuteprune.jobs.bench.load_model", None)
    code, _, stderr = run(*command(writer, folder, folder.parent / ("n" * 256)))
    assert (code, len(stderr.splitlines())) == (2, 1), stderr
    assert "cannot write -" in stderr
    assert "File name too long" in stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=["space", "newline", "255 bytes", "254 bytes"])
def test_folders_of_any_name_are_written(name: str, model: Path, text: Path, run: Run) -> None:
    out = text.parent / "outs" / name
    small = ["--data", text, "--sparsity", 0.2, "--shares", 1, *TINY["prune"]]
    code, stdout, stderr = run("prune", model, "--out", out, *small, "--json")
    assert code == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["out"] == str(out)
    for more in (["inspect", out], ["report", out]):
        code, _, stderr = run(*more)
        assert code == 0, stderr
    tiny = [*TINY["recover"], "--length", 24]
    code, _, stderr = run("recover", out, "--data", text, "--out", out / "again", *tiny)
    assert code == 0, stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", ["base_model", "data"])
def test_records_of_strangers_do_not_steer_the_terminal(
    place: str, workspace: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    shutil.copytree(workspace / "small", out)
    record = json.loads((out / "nuteprune.json").read_text())
    evil = "x\x1b]0;title\x07\x9b31m\u202egpj.exe"
    record["base_model"] = evil
    record["perplexity"]["after"] = {evil: 2.0}
    (out / "nuteprune.json").write_text(json.dumps(record))
    for asked in (["inspect", out], ["inspect", out, "--json"], ["report", out]):
        code, stdout, stderr = run(*asked)
        assert code == 0, stderr
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*stdout, *stderr}
    code, _, stderr = run("eval", f"./{evil}")
    assert (code, "\x1b" in stderr, "x]0;title" in stderr) == (2, False, True), stderr
