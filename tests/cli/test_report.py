"""`nuteprune report` as users call it, and the command in it as they would copy it."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest

from nuteprune.console import Output
from nuteprune.errors import RunFailed, UserError
from nuteprune.jobs.show import print_report
from tests.conftest import Run, json_line


@pytest.fixture
def pictures_are_blank() -> None:
    """They are drawn here."""


def test_help(run: Run) -> None:
    code, out, _ = run("report", "--help")
    assert code == 0
    assert "Usage: nuteprune report" in out


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path, run: Run) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        code, out, err = run("report", folder)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "pass the --out folder" in err


@pytest.mark.slow
def test_a_run_its_report_and_the_same_run_by_the_reports_settings(
    tiny_model, tiny_tokenizer, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", vocab_size=300, tie_word_embeddings=True).save_pretrained("dense")
    tiny_tokenizer.save_pretrained("dense")
    Path("dense/README.md").write_text("---\nlicense: mit\n---\n")
    documents = (f"Teacher {i} is less pruned than student {i + 1}. " * 6 for i in range(80))
    Path("my text.txt").write_text("\n\n\n".join(documents))
    small = ("--steps", 3, "--batch-size", 2, "--length", 24, "--device", "cpu", "--set", "seed=5")
    more = ("--set", "neuron_multiple=4", "--set", "lr_scheduler_kwargs={power: 2, lr_end: 1.0e-9}")
    asked = ("prune", "dense", "--sparsity", 0.3, "--data", "my text.txt", "--out", "out")
    code, _, err = run(*asked, *small, *more)
    assert code == 0, err

    code, out, _ = run("report", "out", "--json")
    assert code == 0
    written = json_line(out)
    assert written["report"] == str(tmp_path / "out/run/report.html")
    names = {"layers", "loss"}
    assert {Path(path).stem for path in written["plots"]} == names
    card = Path("out/README.md").read_text()
    assert "license: mit" in card
    assert re.findall(r"\((run/plots/\w+\.png)\)", card)

    html = Path(written["report"]).read_text()
    command, recipe = map(unescape, re.findall(r"<code>(nuteprune.*?|data:.*?)</code>", html, re.S))
    assert command == "nuteprune prune dense --config FILE --out OUT"
    Path("recipe.yaml").write_text(recipe)
    first = json.loads(Path("out/nuteprune.json").read_text())
    code, _, err = run("prune", "dense", "--config", "recipe.yaml", "--out", "again")
    assert code == 0, err
    second = json.loads(Path("again/nuteprune.json").read_text())
    for key in ("config", "seed", "layers", "perplexity", "sparsity", "teachers", "license"):
        assert second[key] == first[key]
    assert (second["seed"], second["config"]["neuron_multiple"]) == (5, 4)


@pytest.mark.parametrize("error", [UserError, RunFailed])  # the latter where the disk is full
def test_a_checkpoint_stands_without_its_report(
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error("no room")

    monkeypatch.setattr("nuteprune.judge.report.write_report", fail)
    print_report(tmp_path, Output())
    assert capsys.readouterr().out == "Report  none: no room\n"
