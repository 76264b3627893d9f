from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback

from nuteprune import NutePruneConfig, NutePruneTrainer, UserError
from nuteprune.console import Output
from nuteprune.judge.perplexity import perplexities

FOLDER = Path(__file__).parents[2] / "benchmarks"
SETTINGS = {"neuron_multiple": 4, "calibration_blocks": 8}


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


runs, plots, quality = (load(x) for x in ("quality_runs", "quality_plots", "quality"))

BASELINES = ("fisher", "random")
PLAN = quality.Plan(
    methods=("random", "fisher", "similarity"),
    targets=(0.2, 0.4),
    seeds=(0, 1),
    trained=("nuteprune", "fisher"),
    trained_once=("random",),
    trained_targets=(0.3,),
    steps=3,
    long_steps=4,
    long_factors=("no re-fit",),
    ablation={"no re-fit": {"compensation": False}, "too much": {"gates": "hidden,heads,nose"}},
)


@pytest.fixture
def setting(tiny_model, tiny_tokenizer, tmp_path: Path) -> Any:
    folder = tmp_path / "model"
    tiny_model("llama", vocab_size=300).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    words = random.Random(0).choices(["student", "teacher", "gate", "mask", "head"], k=6000)
    text = tmp_path / "words.jsonl"
    rows = [{"text": " ".join(words[i : i + 20])} for i in range(0, 6000, 20)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return runs.Setting(str(folder), str(text), 32, 6, "cpu", "float32", SETTINGS)


@pytest.mark.slow
def test_a_table_is_made_once_and_goes_on_where_it_stopped(
    setting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    out = tmp_path / "table"
    started: list[str] = []
    table = quality.run(PLAN, runs.Bench(setting, out, started.append), Output())
    cells = [*table["untrained"], *table["trained"], *table["ablation"]]
    # The ablation's default is a run of the trained part, and the dense model is a cell too.
    assert len(cells) == 12 + (4 + 1 + 3) + (1 + 2)
    short = [r for r in table["trained"] if r["steps"] == 3]
    assert [r["seed"] for r in short if r["label"] == "random"] == [0]
    assert len(started) == len(cells)
    means = {x: statistics.fmean(r["mean"] for r in short if r["label"] == x) for x in BASELINES}
    best = min(means, key=means.__getitem__)
    assert [r["label"] for r in table["trained"][-3:]] == ["nuteprune", best, "no re-fit"]
    assert [r["steps"] for r in table["trained"][-3:]] == [4, 4, 4]
    assert json.loads((out / "table.json").read_text()) == table
    for record in cells:
        if record["label"] == "too much":
            assert "'nose' is not a kind of gate" in record["refused"]
            continue
        assert record["sparsity"] >= record["target"] - 1e-9
        assert record["params"] < table["dense"]["params"]
        assert record["seconds"] > 0
        assert record["machine"]["torch"]
    printed = capsys.readouterr().out
    for text in ("random", "similarity", "re-fitted", " ± ", "no re-fit", "is not a kind of gate"):
        assert text in printed
    for field in ("params", "seconds"):
        png = (out / f"perplexity-by-{field}.png").read_bytes()
        assert png[:4] == b"\x89PNG"
        assert len(png) > 10_000

    # Stopped before two of its cells: those alone are run again, and come out the same.
    lost = sorted(x for x in out.glob("*seed-1.json") if "fisher_20" in x.name or "3-st" in x.name)
    for file in lost:
        file.unlink()
    again: list[str] = []
    second = quality.run(PLAN, runs.Bench(setting, out, again.append), Output())
    assert sorted(again) == [f"running {file.name}" for file in lost]
    assert len(lost) == 3
    for part in ("untrained", "trained", "ablation"):
        ours = [r.get("perplexity") for r in second[part]]
        assert ours == [r.get("perplexity") for r in table[part]]
    monkeypatch.setattr(runs.Bench, "_attempt", lambda *_: pytest.fail("there is nothing to run"))
    quality.run(PLAN, runs.Bench(setting, out), Output(), ["untrained"])

    # What is missing is left out of what is shown, and so is a part of which nothing is there.
    for file in lost:
        file.unlink()
    shown = quality.run(PLAN, runs.Bench(setting, out), Output(), show=True)
    assert len(shown["untrained"]) + len(shown["trained"]) == len(cells) - 3 - 3
    for file in out.glob("*_0-steps_*"):
        file.unlink()
    capsys.readouterr()
    assert quality.run(PLAN, runs.Bench(setting, out), Output(), show=True)["untrained"] == []
    assert "Nothing trained" not in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing has been run"):
        quality.run(PLAN, runs.Bench(setting, tmp_path / "empty"), Output(), show=True)


@pytest.mark.parametrize("refitted", [False, True])
def test_an_untrained_cell_is_what_the_trainer_cuts_without_steps(
    refitted: bool, setting: Any, tmp_path: Path
) -> None:
    bench = runs.Bench(setting, tmp_path / "table")
    cell = quality.Cell("wanda", {"method": "wanda"}, 0.3, 0, 5)
    bench.run(dataclasses.replace(cell, target=0.5))  # leaves the dense model as it was
    record = bench.run(cell)

    config = NutePruneConfig(
        output_dir=str(tmp_path / "run"),
        method="wanda",
        target_sparsity=0.3,
        max_steps=0,
        seed=5,
        compensation=refitted,
        use_cpu=True,
        **SETTINGS,
    )
    text = bench._text(config)
    trainer = NutePruneTrainer(bench._load(), config, text)
    trainer.remove_callback(PrinterCallback)
    small = trainer.finalize()
    expected = perplexities(small, bench.held_out)
    found = (record["refitted"] if refitted else record)["perplexity"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert record["params"] == sum(p.numel() for p in small.parameters())


def test_a_folder_holds_the_table_of_one_setting(setting: Any, tmp_path: Path) -> None:
    runs.Bench(setting, tmp_path / "table")
    with pytest.raises(UserError, match="a table of other settings"):
        runs.Bench(dataclasses.replace(setting, length=64), tmp_path / "table")


@pytest.mark.slow
def test_the_command_runs_a_part_and_ends_with_a_json_line(
    setting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", setting.model, "--data", setting.data, "--length", "32", "--quick"]
    options += [
        "--out",
        str(tmp_path / "quick"),
        "--only",
        "untrained",
        "--device",
        "cpu",
        "--json",
    ]
    options += ["--set", "neuron_multiple=4", "--set", "calibration_blocks=4"]
    assert quality.main(options) == 0
    captured = capsys.readouterr()
    line = json.loads(captured.out)  # nothing else is on stdout
    assert {r["label"] for r in line["untrained"]} == set(quality.METHODS)
    assert "wanda" in captured.err
    assert quality.main([*options, "--set", "nonsense=1"]) == 2
    assert "unknown setting 'nonsense'" in capsys.readouterr().err


def test_a_front_keeps_what_no_other_beats() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 6.0), (2.5, 2.0), (4.0, 1.0)]
    assert plots.front(points) == [(1.0, 5.0), (2.5, 2.0), (3.0, 1.0)]
