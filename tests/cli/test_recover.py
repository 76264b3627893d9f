from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, TrainerCallback

from nuteprune import NutePruneConfig, NutePruneTrainer
from nuteprune.data.training_text import training_blocks
from nuteprune.export.loading import load_pruned
from nuteprune.jobs import recover as recovery
from nuteprune.jobs.guard import alone
from nuteprune.jobs.sources import load_tokenizer
from nuteprune.judge.context import copying
from tests.conftest import Run, json_line

pytestmark = pytest.mark.slow

QUICK: list[str] = ["--batch-size", "4", "--length", "24", "--learning-rate", "1e-2"]


@pytest.fixture(scope="module")
def pruned(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint that is stored in bfloat16."""
    from typer.testing import CliRunner

    from nuteprune.cli.app import make_app

    half = tmp_path_factory.mktemp("half")
    load_pruned(model, dtype=torch.bfloat16).save_pretrained(half)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, half / name)
    out = tmp_path_factory.mktemp("pruned") / "out"
    size = ["--length", "24", "--steps", "2", "--batch-size", "2", "--sparsity", "0.3"]
    where = ["--data", str(text), "--out", str(out), "--device", "cpu", "--dtype", "float32"]
    done = CliRunner().invoke(make_app(), ["prune", str(half), *size, *where])
    assert done.exit_code == 0, done.output
    return out


def options(source: Path, out: Path, *more: Any) -> list[Any]:
    return ["recover", source, "--out", out, "--device", "cpu", *QUICK, *more]


def test_two_recoveries_do_not_share_a_folder(
    pruned: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    with alone(tmp_path / "out"):
        code, _, stderr = run(*options(pruned, tmp_path / "out", "--data", text, "--steps", 1))
    assert code == 2
    assert "another run is at work" in stderr


@pytest.mark.slow
def test_plain_text_lowers_perplexity_and_keeps_the_record(
    pruned: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    asked = ["--data", text, "--steps", 12, "--dtype", "float32"]
    code, stdout, stderr = run(*options(pruned, out, *asked), "--json")
    assert (code, "Traceback" in stderr) == (0, False), stderr
    result, old = json_line(stdout), json.loads((pruned / "nuteprune.json").read_text())
    record = json.loads((out / "nuteprune.json").read_text())
    assert record.items() <= result.items()
    changed = {"perplexity", "copying", "recover", "bytes_on_disk", "answers"}
    assert "answers" not in record  # they were those of the model before
    assert {k: v for k, v in record.items() if k not in changed} == {
        k: v for k, v in old.items() if k not in changed
    }
    entry = record["recover"]
    assert (entry["kind"], entry["steps"], entry["sequences"]) == ("text", 12, 48)
    # Judged by the very blocks that the pruned model was judged by.
    assert record["perplexity"]["before"] == old["perplexity"]["before"]
    assert record["perplexity"]["protocol"] == old["perplexity"]["protocol"]
    assert entry["perplexity"]["before"]["text.txt"] == pytest.approx(
        old["perplexity"]["after"]["text.txt"],
        rel=1e-5,
    )
    assert record["perplexity"]["after"]["text.txt"] < 0.9 * old["perplexity"]["after"]["text.txt"]
    small = load_pruned(out)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert record["copying"]["before"] == old["copying"]["before"]  # the dense model's
    assert record["copying"]["after"] == copying(small, tokenizer).percent
    assert small.dtype == torch.bfloat16
    assert sum(p.numel() for p in small.parameters()) == record["params"]["after"]
    assert small.config.to_dict() == load_pruned(pruned).config.to_dict() | {
        "_name_or_path": str(out)
    }
    fp32 = ["--device", "cpu", "--dtype", "float32", "--json"]
    code, stdout, _ = run("eval", out, "--data", text, "--length", 24, *fp32)
    judged = json_line(stdout)["perplexity"][str(out)]["text.txt"]
    # To the last digits: of the weights as they were rounded for the file.
    assert judged == pytest.approx(record["perplexity"]["after"]["text.txt"], rel=1e-5)
    assert "Recovered   12 steps" in run("inspect", out)[1]
    assert "Fine-tuned afterwards: 12 steps on text.txt." in (out / "README.md").read_text()
    assert run("report", out)[0] == 0
    page = (out / "run" / "report.html").read_text()
    assert "it was fine-tuned for 12 steps on" in page
    assert "grows sparse" not in page
    assert "nan" not in page.split("<main>")[1]
    (found,) = re.findall(r"<code>nuteprune recover</code>.*?<code>(.*?)</code>", page, re.S)
    told = yaml.safe_load(unescape(found))
    assert (told["data"], told["steps"], told["batch_size"]) == (str(text), 12, 4)

    code, stdout, stderr = run(*options(out, tmp_path / "more", *asked), "--json")
    assert code == 0, stderr
    assert json_line(stdout)["recover"]["earlier"] == entry


@pytest.mark.slow
def test_instructions_by_epochs(pruned: Path, text: Path, tmp_path: Path, run: Run) -> None:
    rows = [{"instruction": f"Say {i}", "output": "A teacher"} for i in range(300)]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([*rows, {"instruction": "Say", "output": ""}]))
    out = tmp_path / "out"
    asked = ["--data", path, "--epochs", 0.1, "--length", 128, "--eval-data", text]
    code, stdout, stderr = run(*options(pruned, out, *asked), "--json")
    assert code == 2
    assert "the model knows 64 positions" in stderr
    wide = tmp_path / "wide"
    shutil.copytree(pruned, wide, ignore=shutil.ignore_patterns("run", "SHA256SUMS"))
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    code, stdout, stderr = run(*options(wide, out, *asked), "--json")
    assert code == 0, stderr
    record = json_line(stdout)
    entry = record["recover"]
    assert (entry["kind"], entry["template"]) == ("instructions", "auto")
    assert 270 <= entry["sequences"] <= 300
    assert entry["steps"] == -(-entry["sequences"] // 4) // 10 + 1
    assert f"Run     {entry['steps']} steps of 4 x 128 tokens" in stderr
    assert (
        "1 rows without an answer within 128 tokens left out" in stderr or entry["sequences"] < 300
    )
    # Judged by other blocks than the pruned model was: nothing of the dense model to set beside.
    assert record["perplexity"]["before"] == {}
    assert run("inspect", out)[0] == 0


def test_an_intact_model_can_be_tuned_for_comparison(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run(*options(model, out, "--data", text, "--steps", 2), "--json")
    assert code == 0, stderr
    assert json_line(stdout)["recover"]["seconds_per_step"] > 0
    assert not (out / "nuteprune.json").exists()
    assert "not pruned" in stderr
    assert run("report", out)[0] == 0
    page = (out / "run" / "report.html").read_text()
    assert "trained for 2 steps" in page
    assert "has not been finished" not in page
    assert load_pruned(out).dtype == load_pruned(model).dtype


def test_a_checkpoint_of_the_python_api_is_as_good(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    tokenizer = load_tokenizer(str(model))
    blocks = training_blocks(str(text), tokenizer, length=24, count=16, seed=0)
    settings = {"calibration_blocks": 2, "neuron_multiple": 4}
    args = NutePruneConfig(output_dir=str(tmp_path / "run"), max_steps=0, use_cpu=True, **settings)
    trainer = NutePruneTrainer(load_pruned(model), args, blocks, processing_class=tokenizer)
    trainer.finalize()
    record = trainer.save_pruned(tmp_path / "small")
    assert record["base_model"] == str(model)
    assert record["config"].items() >= settings.items()
    assert "output_dir" not in record["config"]
    code, stdout, stderr = run("inspect", tmp_path / "small")
    assert code == 0, stderr
    assert str(model) in "".join(stdout.split())  # its title is wrapped
    for name in ("base_model", "perplexity"):  # as earlier versions wrote them
        del record[name]
    (tmp_path / "small" / "nuteprune.json").write_text(json.dumps(record))
    assert run("inspect", tmp_path / "small")[0] == 0
    asked = ["--data", text, "--steps", 2]
    code, _, stderr = run(*options(tmp_path / "small", tmp_path / "out", *asked))
    assert code == 0, stderr
    assert run("report", tmp_path / "out")[0] == 0


def test_what_is_overwritten_goes_when_the_settings_are_known_to_work(
    pruned: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    kept, link = tmp_path / "elsewhere", tmp_path / "out"
    kept.mkdir()
    link.symlink_to(kept)
    asked = options(pruned, link, "--data", text, "--steps", 1)
    assert run(*asked)[0] == 0
    before = (kept / "model.safetensors").stat().st_mtime_ns
    code, _, stderr = run(*asked, "--overwrite", "--report-to", "no such tracker")
    assert code == 2, stderr
    assert (kept / "model.safetensors").stat().st_mtime_ns == before
    code, _, stderr = run(*asked, "--overwrite")
    assert code == 0, stderr
    assert (kept / "model.safetensors").stat().st_mtime_ns > before
    assert link.is_symlink()
    fresh = tmp_path / "a" / "b" / "fresh"
    assert run(*options(pruned, fresh, "--data", text, "--report-to", "no such tracker"))[0] == 2
    assert not (tmp_path / "a").exists()


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_resumed_is_never_interrupted(
    pruned: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--data", text, "--steps", 5, "--save-steps", 2, "--dtype", "float32"]
    assert run(*options(pruned, tmp_path / "a", *asked))[0] == 0
    again = options(pruned, tmp_path / "b", *asked)
    assert run(*again, "--resume")[0] == 2
    assert not (tmp_path / "b").exists()

    class Killed(recovery.RecoverTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(StopAt())

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "RecoverTrainer", Killed)
        code, _, stderr = run(*again)
    assert (code, "Traceback" in stderr) == (130, False)
    assert [x.name for x in (tmp_path / "b").iterdir()] == ["run"]
    assert run(*again, "--resume")[0] == 0
    first = (tmp_path / "a/model.safetensors").read_bytes()
    assert (tmp_path / "b/model.safetensors").read_bytes() == first

    code, _, stderr = run(*again)
    assert code == 2
    assert "--overwrite" in stderr
    assert run(*again, "--overwrite")[0] == 0
    assert (tmp_path / "b/model.safetensors").read_bytes() == first


BAD: dict[str, tuple[list[str], str]] = {
    "into the model": (["--out", "PRUNED", "--overwrite"], "holds the model"),
    "above the model": (["--out", "ABOVE", "--overwrite"], "holds the model"),
    "steps and epochs": (["--steps", "2", "--epochs", "1"], "pass one of them"),
    "epochs of text": (["--epochs", "1"], "--steps"),
    "no steps": (["--steps", "0"], "steps is 0; it must be at least 1"),
    "negative rate": (["--learning-rate", "-1"], "it must be at least 1e-12"),
    "rank 0": (["--lora-rank", "0"], "at least 1"),
    "no batch": (["--batch-size", "0"], "at least 1"),
    "no such data": (["--data", "nope.txt"], "nope.txt"),
    "two texts": (["--data", "demo", "--data", "nope.txt"], "not demo, nope.txt"),
    "text of its own": (["--data", "self"], "recover writes no text itself"),
    "no such text to judge by": (["--eval-data", "nope.txt"], "nope.txt"),
    "no such model": (["MODEL", "./nope"], "nope"),
    "unknown dtype": (["--dtype", "float99"], "float99"),
    "unknown template": (["--template", "vicuna"], "auto, chat, alpaca"),
    "template of text": (["--template", "alpaca"], "is plain text, which has no template"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, pruned: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    args, expected = BAD[case]
    places = {"PRUNED": pruned, "ABOVE": pruned.parent}
    given = [places.get(x, x) for x in args]
    source: Any = pruned
    if given[0] == "MODEL":
        source, given = given[1], []
    given += [] if "--data" in given else ["--data", text]
    given += [] if "--out" in given else ["--out", tmp_path / "out"]
    code, _, stderr = run("recover", source, "--device", "cpu", "--length", 24, *given)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert (code, len(lines)) == (2, 1), stderr
    assert expected in lines[0]
    assert not (tmp_path / "out").exists()
    assert (pruned / "model.safetensors").exists()
