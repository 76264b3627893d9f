"""The commands as users call them, on a tiny model and text."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nuteprune.console import Output
from nuteprune.errors import Interrupted, RunFailed, UserError
from nuteprune.export.loading import load_pruned
from nuteprune.jobs.guard import alone
from nuteprune.stages import judge
from tests.conftest import Run, json_line

from .conftest import TINY

pytestmark = pytest.mark.slow


def options(model: Path, text: Path, out: Path, **changes: Any) -> list[str]:
    values = {
        "sparsity": 0.3,
        "data": text,
        "out": out,
        "steps": 3,
        "batch-size": 2,
        "length": 24,
        "device": "cpu",
        **changes,
    }
    flags = [str(x) for k, v in values.items() if v is not None for x in (f"--{k}", v)]
    few = ["--set", "calibration_blocks=4", "--set", "eval_blocks=2"]
    return ["prune", str(model), *flags, "--set", "neuron_multiple=4", *few]


def test_no_command_is_a_question_for_help(run: Run) -> None:
    code, stdout, stderr = run()
    assert (code, stderr) == (0, "")
    assert len(stdout.splitlines()) > 10
    assert "..." not in stdout.replace("[ARGS]...", "")  # each command's line is shown whole
    assert stdout == run("--help")[1]


def test_version(run: Run) -> None:
    assert run("--version")[1].startswith("nuteprune ")


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "1000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)], ids=["", "given"]
)
def test_threads_that_wait_spin_a_little_where_nothing_else_is_said(
    run: Run, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_a_file_takes_tables_whole(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    names = [f"a column of some width {i}" for i in range(6)]
    Output().table("wide", names, [["x"] * 6])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_prune_eval_and_inspect(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    judged_as_eval_does = ["--set", "eval_blocks=24"]
    code, stdout, stderr = run(*options(model, text, out), *judged_as_eval_does, "--json")
    assert (code, "Traceback" in stderr) == (0, False)
    record = json_line(stdout)
    assert json.loads((out / "nuteprune.json").read_text()).items() <= record.items()
    assert 0.3 <= record["sparsity"] <= 0.3 + 4 * 3 * 32 / record["params"]["blocks_before"]
    loaded = load_pruned(out)
    assert record["params"]["after"] == sum(p.numel() for p in loaded.parameters())
    assert record["bytes_on_disk"] == (out / "model.safetensors").stat().st_size
    names = {"config.json", "modeling_pruned.py", "README.md", "tokenizer.json"}
    assert names <= {path.name for path in out.iterdir()}
    steps = [json.loads(x)["step"] for x in (out / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]

    code, stdout, _ = run("inspect", out, "--json")
    assert code == 0
    assert json_line(stdout)["counted"] == record["params"]["after"]

    asked = ["--data", text, "--length", 24, "--device", "cpu", "--json"]
    code, stdout, _ = run("eval", out, "--against", model, *asked)
    assert code == 0
    judged = json_line(stdout)["perplexity"]
    assert judged[str(out)] == pytest.approx(record["perplexity"]["after"], rel=1e-3)
    assert judged[str(model)] == pytest.approx(record["perplexity"]["before"], rel=1e-3)


@pytest.mark.parametrize("frozen", [0.5, 1.0], ids=["half-way", "at the end"])
def test_learned_masks_frozen_far_from_the_target_are_told_of(
    frozen: float, model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    few = options(model, text, tmp_path / "out", steps=4)
    learned = ["--set", "progressive=true", "--set", "gate_type=hard_concrete"]
    learned += ["--set", f"freeze_share={frozen}"]
    code, _, err = run(*few, *learned)
    assert code == 0, err
    steps = (tmp_path / "out/run/metrics.jsonl").read_text().splitlines()
    before = json.loads(steps[1 if frozen < 1 else 3])  # the last step with masks that move
    told = [x for x in err.splitlines() if x.startswith("learned masks were frozen")]
    assert len(told) == 1, err
    assert f"expected to cut {before['sparsity']:.1%}, not {before['target']:.1%}" in told[0]

    code, _, err = run(*options(model, text, tmp_path / "ranked", steps=4))
    assert (code, "were frozen" in err) == (0, False), err


def test_the_dtype_of_the_input_is_kept(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    half = load_pruned(model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((model / name).read_bytes())
    settings = options(tmp_path / "half", text, tmp_path / "out", dtype="float32")
    assert run(*settings)[0] == 0
    assert load_pruned(tmp_path / "out").dtype == torch.bfloat16


def test_dry_run_writes_nothing(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    code, stdout, _ = run(*options(model, text, tmp_path / "out"), "--dry-run", "--json")
    assert code == 0
    assert json_line(stdout)["sparsity"][0] >= 0.3
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_whoever_names_no_text_is_told_which_one_it_is(
    model: Path, text: Path, in_workspace: Path, run: Run
) -> None:
    dry = ["prune", model, "--sparsity", 0.2, "--out", "new", *TINY["prune"]]
    dry += ["--set", "neuron_multiple=4", "--dry-run"]
    code, out, err = run(*dry)
    assert code == 0, err
    assert "Note    the text is the demo's" in out
    assert "Note " not in run(*dry, "--data", text)[1]
    assert "Note " not in run("prune", "demo", *dry[2:])[1]


@pytest.mark.slow
def test_whoever_cuts_around_a_large_embedding_is_told(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    large = tmp_path / "large"
    tiny_model("llama", vocab_size=4000, tie_word_embeddings=True).save_pretrained(large)
    tiny_tokenizer.save_pretrained(large)
    code, out, err = run(*options(large, text, tmp_path / "out"), "--dry-run")
    assert code == 0, err
    assert "Note    the embedding has " in out
    assert "--vocab auto" in out


@pytest.mark.slow
def test_resume_and_overwrite(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    saving = [*options(model, text, out), "--set", "save_steps=2"]
    assert run(*saving, "--resume")[0] == 2
    assert not out.exists()
    assert run(*saving)[0] == 0
    first = (out / "model.safetensors").read_bytes()
    code, _, err = run(*saving)
    assert code == 2
    assert "--overwrite" in err
    assert run(*saving, "--overwrite")[0] == 0
    assert (out / "model.safetensors").read_bytes() == first
    for path in (out / "run/checkpoint-3").iterdir():
        path.unlink()
    (out / "run/checkpoint-3").rmdir()
    assert run(*saving, "--resume")[0] == 0
    assert (out / "model.safetensors").read_bytes() == first


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 4])
def test_killed_before_its_first_checkpoint_a_run_keeps_what_its_model_wrote(
    steps: int, model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*options(model, text, whole, steps=steps))[0] == 0
    asked = options(model, text, out, steps=steps)
    with monkeypatch.context() as patch:
        patch.setattr("nuteprune.run.Run.judge_dense", stop)
        assert run(*asked)[0] == 130
    written = (out / "run" / "self.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("nuteprune.stages.write.write_batch", None)  # it writes nothing again
        code, _, err = run(*asked, "--resume")
    assert code == 0, err
    assert (out / "run" / "self.jsonl").read_bytes() == written
    for name in ("model.safetensors", "run/settings.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_killed_in_its_first_steps_a_run_begins_anew_as_the_same(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*options(model, text, whole, shares=1))[0] == 0
    asked = options(model, text, out, shares=1)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer.train", stop)
        assert run(*asked)[0] == 130
    kept = {x.name for x in (out / "run").iterdir() if x.is_file()}
    assert "settings.json" in kept
    code, _, err = run(*asked, "--set", "seed=7", "--resume")
    assert (code, "seed 42, not 7" in err) == (2, True)
    code, _, err = run(*asked, "--resume")
    assert code == 0, err
    name = "model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_resumed_run_says_whether_its_text_was_written_before(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    assert run(*options(model, text, out, steps=1))[0] == 0
    for steps, anew in ((1, False), (20, True)):
        code, said, err = run(*options(model, text, out, steps=steps), "--resume")
        assert code == 0, err
        assert ("Resumed write, " in said) != anew


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--length", "2"], "no room for text: pass a greater length"),
        (["--set", "dataloader_persistent_workers=true"], "needs num_workers > 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_removed(
    change: list[str], message: str, model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("the user's")
    code, _, err = run(*options(model, text, out), *change, "--overwrite")
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert [x.name for x in out.iterdir()] == ["mine"]


def test_of_several_processes_one_says_that_a_run_was_stopped(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise Interrupted("stopped", signal.SIGTERM)

    monkeypatch.setattr("nuteprune.jobs.prune.run", stop)
    for rank, line in (("0", "nuteprune: stopped\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        code, _, err = run(*options(model, text, tmp_path / "out"))
        assert (code, err) == (143, line)


def test_what_fails_in_another_process_alone_is_told_there(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    for error, code, line in (
        (RunFailed("no room"), 1, "nuteprune: process 1: no room\n"),
        (UserError("no such file"), 2, ""),
    ):
        monkeypatch.setattr("nuteprune.jobs.prune.run", Mock(side_effect=error))
        assert run(*options(model, text, tmp_path / "out"))[::2] == (code, line)


@pytest.mark.slow
def test_a_run_is_not_gone_on_with_as_another(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    saving = [*options(model, text, out), "--set", "save_steps=2"]
    assert run(*saving)[0] == 0
    for change, name in (
        (["--sparsity", "0.4"], "sparsity [0.3], not [0.4]"),
        (["--set", "seed=7"], "seed 42, not 7"),
        (["--length", "16"], "length 24, not 16"),
        (["--sparsity", "0.1,0.3"], "sparsity [0.3], not [0.1, 0.3]"),
    ):
        code, _, err = run(*saving, "--resume", *change)
        assert (code, err.count("\n")) == (2, 1)
        assert name in err
    (out / ".git").mkdir()
    relative = Path(os.path.relpath(text))
    again = [*options(model, relative, out), "--set", "save_steps=3", "--gradient-checkpointing"]
    code, _, err = run(*again, "--resume")
    assert code == 0, err
    assert (out / ".git").is_dir()
    for name in ("notes.txt", "eval.json"):
        (out / name).write_text("the user's")
        code, _, err = run(*saving, "--resume")
        assert code == 2
        assert f"holds {name}, which the run has not written" in err
        assert (out / name).read_text() == "the user's"
        code, _, err = run(*saving, "--resume", "--overwrite")
        assert code == 0, err
        assert not (out / name).exists()


def test_two_runs_do_not_share_a_folder(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    with alone(out):
        code, _, err = run(*options(model, text, out), "--overwrite")
    assert code == 2
    assert "another run is at work" in err
    assert not any(out.iterdir())
    assert run(*options(model, text, out))[0] == 0


def test_home_is_found_where_the_shell_leaves_it(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(*options(model, text, Path("~/out"), steps=0))[0] == 0
    assert (tmp_path / "out/nuteprune.json").is_file()
    code, _, err = run("export", "~/out", "--to", "gguf", "--out", "~/out.gguf")
    assert code == 0, err
    assert (tmp_path / "out.gguf").is_file()
    assert not Path("~").exists()
    code, _, err = run(*options(model, Path("~0"), tmp_path / "new"))  # there is no such user
    assert code == 2
    assert "'~0': no such file or folder" in err


def test_a_model_that_computes_nothing_finite_is_no_success(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "perplexities", lambda *_, **__: {"text": float("inf")})
    code, _, err = run(*options(model, text, tmp_path / "out"))
    assert code == 1
    assert "the perplexity of the dense model is not finite" in err


def test_figures_that_are_not_finite_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).result({"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}}


def test_a_yaml_file_and_set_give_settings(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsity: 0.25\nsteps: 2\nlearning_rate: 1e-3\nneuron_multiple: 4\n")
    settings = options(model, text, tmp_path / "out", sparsity=None, steps=None)
    code, stdout, _ = run(*settings, "--config", recipe, "--set", "lora_rank=4", "--json")
    assert code == 0
    record = json_line(stdout)
    assert record["target"] == 0.25
    assert record["config"]["learning_rate"] == 1e-3
    assert record["config"]["lora_rank"] == 4


PRUNE = "prune MODEL --sparsity 0.2 --out OUT --data TEXT --length 24".split()  # noqa: SIM905
BAD = {
    "no model": (["prune", "--sparsity", "0.2", "--out", "OUT"], "argument"),
    "missing folder": (["prune", "./nope", "--sparsity", "0.2", "--out", "OUT"], "nope"),
    "no sparsity": (["prune", "MODEL", "--out", "OUT"], "--sparsity"),
    "sparsity 0": (
        ["prune", "MODEL", "--sparsity", "0", "--out", "OUT", "--data", "TEXT"],
        "between",
    ),
    "sparsity 1.5": (
        ["prune", "MODEL", "--sparsity", "1.5", "--out", "OUT", "--data", "TEXT"],
        "between",
    ),
    "out of reach": ([*PRUNE, "--sparsity", "0.9", "--set", "gates=kv_groups"], "at most"),
    "folder of an unset variable": ([*PRUNE, "--out", ""], "--out is empty"),
    "model of an unset variable": (["eval", "", "--data", "TEXT"], "a name is empty"),
    "text of an unset variable": ([*PRUNE, "--data", ""], "a name is empty"),
    "no such data": ([*PRUNE, "--data", "no.txt"], "no.txt"),
    "empty data": ([*PRUNE, "--data", "EMPTY"], "EMPTY"),
    "unknown option": (["prune", "MODEL", "--sparsty", "0.2", "--out", "OUT"], "--sparsity"),
    "unknown key": ([*PRUNE, "--set", "lerning_rate=1"], "learning_rate"),
    "wrong type": ([*PRUNE, "--set", "max_steps=many"], "type int"),
    "unknown gate": ([*PRUNE, "--gates", "headz"], "known kinds"),
    "unknown device": ([*PRUNE, "--device", "abacus"], "abacus"),
    "unknown dtype": ([*PRUNE, "--dtype", "float99"], "float99"),
    "unknown command": (["prun"], "prun"),
    "inspect what is no checkpoint": (["inspect", "."], "nuteprune.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "EMPTY"
    empty.mkdir()
    (empty / "empty.txt").write_text("")
    places = {"MODEL": str(model), "TEXT": str(text), "OUT": "out", "EMPTY": "EMPTY"}
    args, expected = BAD[case]
    code, _, stderr = run(*[places.get(x, x) for x in args])
    assert code == 2
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert expected in lines[0]
    assert not (tmp_path / "out").exists()


def test_unsupported_and_non_causal_models_are_refused(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    for change, expected in (
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "it is an encoder, no dec"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal"),
    ):
        folder = tmp_path / str(change["architectures"])
        folder.mkdir()
        values = json.loads((model / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(values))
        code, _, err = run(*options(folder, text, tmp_path / "out"))
        assert code == 2
        assert expected in err


def test_interrupt_is_exit_code_130(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nuteprune.train.trainer import NutePruneTrainer

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(NutePruneTrainer, "train", interrupt)
    code, _, err = run(*options(model, text, tmp_path / "out"))
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_pruned_checkpoint_is_pruned_again_and_its_record_says_so(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    once, twice, thrice = tmp_path / "once", tmp_path / "twice", tmp_path / "thrice"
    assert run(*options(model, text, once))[0] == 0
    assert run(*options(once, text, twice, sparsity=0.2))[0] == 0
    assert run(*options(twice, text, thrice, sparsity=0.1, steps=0))[0] == 0
    records = [json.loads((x / "nuteprune.json").read_text()) for x in (once, twice, thrice)]
    for before, after in itertools.pairwise(records):
        assert after["params"]["before"] == before["params"]["after"]
        assert after["layers_before"] == [
            {k: row[k] for k in ("heads", "kv_heads", "neurons")} for row in before["layers"]
        ]
    assert "history" not in records[0]
    assert [step["target"] for step in records[2]["history"]] == [0.3, 0.2]
    assert records[2]["base_model"] == str(model)


@pytest.mark.slow
def test_several_targets_and_chosen_dimensions_from_the_command_line(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    several = tmp_path / "several"
    code, stdout, _ = run(*options(model, text, several, sparsity="0.2,0.4", steps=6), "--json")
    assert code == 0
    targets = json_line(stdout)["targets"]
    assert [record["target"] for record in targets] == [0.2, 0.4]
    for record in targets:
        folder = several / f"sparsity-{record['target']:g}"
        assert record["out"] == str(folder)
        assert record["sparsity"] >= record["target"]
        assert load_pruned(folder).config.num_hidden_layers == 3
        page = (folder / "run" / "report.html").read_text()
        assert f"(target {record['target']:.1%})".replace("%", "\u202f%") in page
        steps = (folder / "run" / "metrics.jsonl").read_text().count("\n")
        assert re.search(rf"steps of training(<br>[^<]*)?</dt><dd>{steps}</dd>", page)
        assert "(run/plots/layers.png)" in (folder / "README.md").read_text()
    assert run("report", several)[0] == 0
    assert not (several / "run" / "report.html").exists()
    wanted, again = several / "sparsity-0.2" / "nuteprune.json", tmp_path / "again"
    assert run(*options(model, text, again, sparsity=None, shape=wanted))[0] == 0
    assert json.loads((again / "nuteprune.json").read_text())["layers"] == targets[0]["layers"]
    assert run(*options(model, text, tmp_path / "x", shape=wanted))[0] == 2


def test_a_gated_model_is_told_from_one_that_is_not_there(
    text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access.\n401")

    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", refused)
    code, _, stderr = run(*options(Path("big/model"), text, tmp_path / "out"))
    assert code == 2
    assert "huggingface.co/big/model" in stderr
    assert "hf auth login" in stderr


def under_ascii(*args: Any, cwd: Path | None = None) -> tuple[int, str]:
    """Exit code and stderr of a command whose locale knows ASCII alone."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "nuteprune.cli", *map(str, args)]
    done = subprocess.run(
        command, env=os.environ | locale, cwd=cwd, capture_output=True, text=True, encoding="utf-8"
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_name_that_the_locale_cannot_express_is_refused_in_one_line(
    model: Path, text: Path, tmp_path: Path
) -> None:
    advice = "names of files are ascii under this locale, so other letters cannot be read; set"
    code, err = under_ascii(*options(model, text, tmp_path / "größer"))
    assert code == 2
    assert err.startswith(f"nuteprune: {tmp_path}/gr\\xf6\\xdfer: {advice} PYTHONUTF8=1")
    assert err.count("\n") == 1
    (tmp_path / "größer").mkdir()
    code, err = under_ascii(*options(model, text, Path("out")), cwd=tmp_path / "größer")
    assert code == 2
    assert advice in err
    assert err.count("\n") == 1


def test_a_name_within_a_file_may_be_the_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setattr("nuteprune.jobs.inspect.read_record", lambda _: "größer".encode("ascii"))
    code, _, err = run("inspect", ".")
    assert code == 2
    assert "'größer': names of files are ascii" in err


@pytest.mark.parametrize("setting", ["data", "eval_data"])
def test_a_name_in_a_settings_file_may_be_the_one(
    setting: str, model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "größer.txt").write_text(text.read_text())
    named = {"data": str(text), setting: str(tmp_path / "größer.txt")}
    (tmp_path / "job.yaml").write_text(json.dumps(named))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    out = tmp_path / "out"
    words = [*options(model, text, out, data=None), "--config", tmp_path / "job.yaml"]
    code, _, err = run(*words)
    assert code == 2
    assert "größer.txt': names of files are ascii under this locale" in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_a_name_that_is_not_unicode_is_refused(run: Run) -> None:
    code, _, err = run("inspect", "x\udcff")
    assert (code, err) == (2, "nuteprune: x�: the name is not UTF-8; rename it\n")
