"""What needs no model is told without the libraries that compute: help, completion, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from nuteprune.run_folder import CHECKPOINT, RUN

HEAVY = ("torch", "transformers", "datasets", "peft", "numpy", "matplotlib")
START = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", *[x for x in {HEAVY} if x in sys.modules]))
from nuteprune.cli.app import main
main()
"""
EACH = f"""
import contextlib, io, json, sys
from nuteprune.cli.app import main
for words in json.loads(sys.argv[1]):
    sys.argv, said = ["nuteprune", *words], [io.StringIO(), io.StringIO()]
    with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    loaded = [x for x in {HEAVY} if x in sys.modules]
    print(json.dumps([code, *(x.getvalue() for x in said), loaded]))
"""
"""Gives commands one after the other: an interpreter for each would take most of the time."""
COMMANDS = [
    "demo",
    "plan",
    "prune",
    "eval",
    "bench",
    "recover",
    "export",
    "family",
    "inspect",
    "report",
    "vocab",
    "write",
]
RUN_OF = ["prune", "m", "--out", "out"]


def started(*words: str, **environment: str) -> tuple[int, str, str]:
    """What a new interpreter says to a command: exit code, stdout, stderr."""
    command = [sys.executable, "-c", START, *words]
    told = {**os.environ, **environment}
    ended = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
    said, _, loaded = ended.stdout.rpartition("loaded:")
    assert not loaded.split(), loaded
    return ended.returncode, said, ended.stderr


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Any]:
    """What all commands of this file say: words -> exit code, stdout, stderr, what is loaded."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").touch()
    whole = folder / "begun" / RUN / f"{CHECKPOINT}4"
    whole.mkdir(parents=True)
    (whole / "SHA256SUMS").write_text(f"{'0' * 64}  SHA256SUMS\n")
    asked = [*([*x.split(), "--help"] for x in ("", *COMMANDS)), *(words for words, _ in REFUSED)]
    command = [sys.executable, "-c", EACH, json.dumps(asked)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    said = map(json.loads, ended.stdout.splitlines())
    return {tuple(words): answer for words, answer in zip(asked, said, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, answers: dict[tuple[str, ...], Any]) -> None:
    code, stdout, _, loaded = answers[*command.split(), "--help"]
    assert (code, loaded) == (0, [])
    assert stdout.startswith(f"Usage: nuteprune {command}".strip())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "found"),
    [("nuteprune pru", {"prune"}), ("nuteprune prune m --sp", {"--sparsity", "--speedup"})],
)
def test_completion(words: str, found: set[str]) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    code, stdout, _ = started(_NUTEPRUNE_COMPLETE="complete_bash", **asked)
    assert (code, set(stdout.split())) == (0, found)


REFUSED: list[tuple[list[str], str]] = [
    (["prune", "m"], "Missing option '--out'"),
    ([*RUN_OF, "--stepz", "4"], "No such option: --stepz"),
    ([*RUN_OF, "--steps", "four"], "'--steps': Input should be a valid integer"),
    (RUN_OF, "no target given: pass --sparsity"),
    ([*RUN_OF, "--sparsity", "0.2", "--params", "1M"], "--sparsity and --params both say"),
    ([*RUN_OF, "--sparsity", "1.5"], "it must lie between 0 and 1"),
    ([*RUN_OF, "--memory", "4GiB"], "say for how many tokens"),
    ([*RUN_OF, "--speedup", "2@quick"], "asked for at 'quick'"),
    ([*RUN_OF, "--sparsity", "0.2", "--method", "best"], "method is 'best'"),
    ([*RUN_OF, "--sparsity", "0.2", "--gates", "tails"], "'tails' is not a kind of gate"),
    ([*RUN_OF, "--sparsity", "0.2", "--bits", "3"], "bits is 3"),
    ([*RUN_OF, "--sparsity", "0.2", "--dtype", "int8"], "dtype is 'int8'"),
    ([*RUN_OF, "--sparsity", "0.2", "--set", "lora_rank=0"], "lora_rank is 0"),
    ([*RUN_OF, "--sparsity", "0.2", "--resume"], "nothing to resume in out"),
    (["prune", "m", "--out", "full", "--sparsity", "0.2"], "--out full is not empty"),
    (["prune", "m", "--out", "begun", "--sparsity", "0.2"], "or --resume to go on with it"),
    (["demo", "--out", "full"], "--out full is not empty"),
    (["recover", "m", "--out", "full"], "--out full is not empty"),
    (["vocab", "m", "--out", "full", "--keep", "300"], "--out full is not empty"),
    (["write", "m", "--out", "own.jsonl"], "Missing option '--tokens'"),
    (["plan", "m", "--sparsity", "2"], "it must lie between 0 and 1"),
    (["export", "m", "--to", "tar", "--out", "x"], "--to tar is not a known format"),
    (
        ["export", "m", "--to", "onnx", "--out", "x", "--trust-remote-code"],
        "--trust-remote-code is for the tokenizer that --to gguf writes",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else None
)
def test_refusals(words: list[str], message: str, answers: dict[tuple[str, ...], Any]) -> None:
    code, stdout, stderr, loaded = answers[tuple(words)]
    assert (code, stdout, loaded) == (2, "", [])
    assert message in stderr
    assert stderr.count("\n") == 1


@pytest.mark.slow
def test_the_package_is_imported_without_them() -> None:
    check = f"import sys, nuteprune; print(*[x for x in {HEAVY} if x in sys.modules])"
    command = [sys.executable, "-c", check]
    assert not subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
