from __future__ import annotations

import dataclasses
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback

import nuteprune
from nuteprune import NutePruneConfig, NutePruneTrainer, UserError
from nuteprune.console import Output
from nuteprune.data import demo as assets
from nuteprune.judge.context import copying
from nuteprune.judge.perplexity import perplexities, perplexity
from tests.scripts import FOLDER, script

pytestmark = pytest.mark.slow

SETTINGS = {"neuron_multiple": 4, "calibration_blocks": 8}


texts, runs, tables = map(script, ("quality_text", "quality_runs", "quality_tables"))
plots, quality = map(script, ("quality_plots", "quality"))

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
    long_factors=("no refit",),
    ablation={"no refit": {"refit": False}, "too much": {"gates": "hidden,heads,nose"}},
)


@pytest.fixture
def setting(tiny_model, tiny_tokenizer, tmp_path: Path) -> Any:
    folder = tmp_path / "model"
    tiny_model("llama", vocab_size=300, max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    words = random.Random(0).choices(["student", "teacher", "gate", "mask", "head"], k=6000)
    text = tmp_path / "words.jsonl"
    rows = [{"text": " ".join(words[i : i + 20])} for i in range(0, 6000, 20)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return runs.Setting(str(folder), [str(text)], 32, 6, "cpu", "float32", SETTINGS)


def best_of(trained: list[dict[str, Any]]) -> str:
    means = {x: statistics.fmean(r["mean"] for r in trained if r["label"] == x) for x in BASELINES}
    return min(means, key=means.__getitem__)


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
    best = best_of(short)
    assert [r["label"] for r in table["trained"][-3:]] == ["nuteprune", best, "no refit"]
    assert [r["steps"] for r in table["trained"][-3:]] == [4, 4, 4]
    assert json.loads((out / "table.json").read_text()) == table
    for record in cells:
        if record["label"] == "too much":
            assert "'nose' is not a kind of gate" in record["refused"]
            continue
        assert record["sparsity"] >= record["target"] - 1e-9
        assert record["times_dense"]["in_domain"] == record["mean"] / table["dense"]["mean"]
        assert record["params"] < table["dense"]["params"]
        # Random scores are drawn at once: no stage counts them.
        assert record["seconds"] > 0 or record["label"] == "random"
        assert record["machine"]["torch"]
    printed = capsys.readouterr().out
    for text in ("random", "similarity", "refitted", " ± ", "no refit", "is not a kind of gate"):
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
    # Of another best baseline there is no long run.
    no_long_run = best_of([r for r in short if r["seed"] == 0]) != best
    found = len(shown["untrained"]) + len(shown["trained"])
    assert found == len(cells) - 3 - 3 - no_long_run
    for file in out.glob("*_0-steps_*"):
        file.unlink()
    capsys.readouterr()
    assert quality.run(PLAN, runs.Bench(setting, out), Output(), show=True)["untrained"] == []
    assert "Nothing trained" not in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing has been run"):
        quality.run(PLAN, runs.Bench(setting, tmp_path / "empty"), Output(), show=True)


@pytest.mark.slow
def test_a_run_that_was_cut_short_goes_on_from_its_last_checkpoint(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = runs.Cell("ours", {"save_steps": 2, "gates": "heads,neurons"}, 0.2, 4, 0)
    whole = runs.Bench(setting, tmp_path / "whole").run(cell)
    taken: list[int] = []
    step = NutePruneTrainer.training_step

    def stops_in_the_last(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(trainer.state.global_step)
        if taken.count(3) == 1 and taken[-1] == 3:
            raise RuntimeError("the machine is gone")
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(NutePruneTrainer, "training_step", stops_in_the_last)
    out = tmp_path / "cut-short"
    with pytest.raises(RuntimeError, match="machine"):
        runs.Bench(setting, out).run(cell)
    again = runs.Bench(setting, out).run(cell)
    assert taken == [0, 1, 2, 3, 2, 3]
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    assert list((out / "runs").iterdir()) == []


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
        refit=refitted,
        use_cpu=True,
        **SETTINGS,
    )
    model = bench.model()
    text = bench.text(model, cell, config)
    trainer = NutePruneTrainer(model, config, text)
    trainer.remove_callback(PrinterCallback)
    small = trainer.finalize()
    expected = perplexities(small, bench.judge.held_out)
    found = (record["refitted"] if refitted else record)["perplexity"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert record["params"] == sum(p.numel() for p in small.parameters())


def other_text(folder: Path) -> dict[str, list[str]]:
    """Write two domains of other text, whose odd and even lines differ."""
    folder.mkdir()
    drawn = random.Random(1)
    found = {}
    for name, letters in (("code", "abcd"), ("fables", "vwxyz")):
        lines = ["".join(drawn.choices(letters + str(i % 2), k=90)) for i in range(16)]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": x}) + "\n" for x in lines)
        )
        found[name] = lines
    return found


@pytest.mark.parametrize("choose", [False, True])
def test_other_text_is_half_of_the_lines(choose: bool, setting: Any, tmp_path: Path) -> None:
    lines = other_text(tmp_path / "other")
    setting = dataclasses.replace(setting, choose=choose)
    bench = runs.Bench(setting, tmp_path / "table", other_text=tmp_path / "other")
    dense, cell = bench.dense(), quality.Cell("random", {"method": "random"}, 0.3, 2, 0)
    record = quality.rated(bench.run(cell), dense)

    model, tokenizer = bench.model(), bench.tokenizer
    for name, all_lines in lines.items():
        # Counted from 1, as people count lines.
        mine = [x for number, x in enumerate(all_lines, 1) if (number % 2 == 1) == choose]
        joined = [i for x in mine for i in (*tokenizer.encode(x), tokenizer.eos_token_id)]
        count = len(joined) // 256
        assert 1 < count < 24
        blocks = torch.tensor(joined[: 256 * count]).view(count, 256)
        expected = perplexity(model, blocks)
        assert dense["other"][name] == pytest.approx(expected, rel=1e-5)
        assert record["times_dense"]["other"][name] == record["other"][name] / dense["other"][name]
    product = statistics.geometric_mean(record["times_dense"]["other"].values())
    assert record["times_dense"]["other_mean"] == product
    seed = dense["protocol"]["copying_seed"]
    assert (0 <= seed <= 9) == choose
    assert dense["copying"] == copying(model, tokenizer, seed=seed).percent


def test_all_cells_of_a_seed_share_the_text_of_prune(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    training = texts.Texts.training

    def watched(*arguments: Any) -> Any:
        seen.append(training(*arguments).blocks)
        return training(*arguments)

    monkeypatch.setattr(texts.Texts, "training", watched)
    bench = runs.Bench(setting, tmp_path / "table")
    for method in ("surgeon", "random"):
        for steps in (0, 3):
            bench.run(quality.Cell(method, {"method": method}, 0.3, steps, 7))
    bench.run(quality.Cell("no refit", {"refit": False}, 0.3, 3, 7))
    assert len(seen) == 5
    assert all(torch.equal(x, seen[0]) for x in seen)

    # The model has written it once, and writes the same for `prune`.
    (file,) = (tmp_path / "table").rglob("*.jsonl")
    real = NutePruneTrainer.train
    trained: list[Any] = []
    monkeypatch.setattr(
        NutePruneTrainer, "train", lambda s, *x, **y: [trained.append(s), real(s, *x, **y)][1]
    )
    nuteprune.prune(
        setting.model,
        out=tmp_path / "pruned",
        data=setting.data,
        length=32,
        dtype="float32",
        device="cpu",
        sparsity=0.3,
        steps=3,
        seed=7,
        **SETTINGS,
    )
    assert (tmp_path / "pruned" / "run" / "self.jsonl").read_bytes() == file.read_bytes()
    assert torch.equal(trained[0].train_dataset.blocks, seen[0])


@pytest.mark.parametrize("left", ["wikipedia", "recipes"])
def test_a_source_that_is_left_out_judges_and_is_never_trained_on(
    left: str, setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Words of one letter each: a source's own letter is in no other source.
    letter = {"wikipedia": "q", "speeches": "j", "recipes": "z"}
    documents = {
        name: [f"{x * (20 + i % 50)} {i} " * 3 for i in range(2500)] for name, x in letter.items()
    }
    monkeypatch.setattr(assets, "documents", lambda domains: {x: documents[x] for x in domains})
    words = {"data": ["demo"], "leave_out": left}
    # All of the data alone: what a model writes may have any letter.
    setting = dataclasses.replace(setting, **words, shares=[1.0])
    bench = runs.Bench(setting, tmp_path / "table")
    with_self = dataclasses.replace(setting, shares=None).mixture()
    assert with_self[0][1:] == ["self"]
    assert with_self[1] == [0.5, 0.5]
    cell = quality.Cell("random", {"method": "random"}, 0.3, 0, 0)
    config = bench.config(cell, str(tmp_path))
    decode = bench.tokenizer.decode
    trained = "".join(map(decode, bench.text(bench.model(), cell, config).blocks))
    assert {x for x in trained if x in "qjz"} == {*letter.values()} - {letter[left]}
    assert set(bench.judge.held_out) == {*letter} - {left}
    assert set(bench.judge.other) == {left}
    accepted = bench.judge.other[left]
    assert {x for x in "".join(map(decode, accepted)) if x in "qjz"} == {letter[left]}
    chosen = runs.Bench(dataclasses.replace(setting, choose=True), tmp_path / "choose").judge.other
    numbers = [
        {x for x in "".join(map(decode, found)).split() if x.isdigit()}
        for found in (accepted, chosen[left])
    ]
    assert all(len(x) > 5 for x in numbers)
    assert len(numbers[0] & numbers[1]) <= 2  # numbers that a block's end has cut
    assert set(bench.run(cell)["other"]) == {left}


def test_text_that_is_trained_on_is_no_other_text(setting: Any, tmp_path: Path) -> None:
    folder = Path(setting.data[0]).parent
    bench = runs.Bench(setting, tmp_path / "table", other_text=folder)
    with pytest.raises(UserError, match=r"words.jsonl is trained on"):
        bench.dense()
    with pytest.raises(UserError, match="no jsonl files"):
        texts.files_of(tmp_path / "table")


def test_tables_of_before_still_load(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # a table is whole where nobody says how wide
    old = FOLDER / "results" / "quality-0.1.0"
    for file in old.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert quality.main(["--show", "--markdown", "--out", str(tmp_path)]) == 0
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    printed = capsys.readouterr().out
    (row,) = [x.split() for x in printed.splitlines() if x.split()[:3] == ["flap", "20%", "80"]][:1]
    assert row[3:7] == ["32.66", "1.339", "-", "-"]
    untrained, trained = printed.partition("\nTrained:\n\n")[::2]
    assert "| flap | 20% | 80 | 32.66 | 1.339 | - | - | 1 |" in trained
    assert "| fisher | 50% | 0 | 100.8 |" in untrained.partition("\nNothing trained:\n\n")[2]
    assert "| 0 |" not in trained.partition("One factor at a time:")[0]
    factors = trained.partition("One factor at a time:")[2]
    assert factors.count("| 50% | 80 |") == 10  # with names and methods that are gone
    assert "| deterministic, solved | 50% |" in factors


def test_today_s_table_goes_where_none_of_before_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def begin(setting: Any, folder: Path, *_: Any) -> Any:
        asked.append(folder)
        if (folder / "setting.json").exists():
            assert texts.Setting.read(folder / "setting.json") == setting
        raise UserError("far enough")

    monkeypatch.setattr(quality, "Bench", begin)
    for words in ([], ["--only", "ablation"], ["--quick"]):
        assert quality.main(words) == 2
    assert [x.name for x in asked] == ["quality", "quality", "quality-quick"]


def test_a_page_shows_the_rows_of_each_part() -> None:
    times = {"in_domain": 1.2, "other": {"code": 2.0, "fables": 4.5}, "other_mean": 3.0}
    row = {"label": "a", "target": 0.2, "steps": 80, "mean": 30.0, "seconds": 9.6}
    row |= {"times_dense": times, "copying": 44.0}
    raw = row | {"label": "b", "steps": 0, "copying": None}
    refit = {"refitted": {"mean": 20.0, "copying": 60.0}}
    table = {"trained": [row, row | {"copying": 45.0}], "untrained": [raw | refit]}
    columns = ["run", "target", "steps", *tables.COLUMNS]
    wanted = {
        "Nothing trained": "|b|20%|0|30.00|1.200|3.000|-|1|10|",
        "Nothing trained, projections refitted": "|b|20%|0|20.00|1.200|3.000|60.0|1|10|",
        "Trained": "|a|20%|80|30.00±0.00|1.200±0.000|3.000±0.000|44.5±0.7|2|10|",
    }
    shown = tables.markdown(table, quality.PARTS).split("\n\n")
    assert len(shown) == 6
    assert shown[::2] == [f"{title}:" for title in wanted]
    head = f"|{'|'.join(columns)}|\n{'|---' * len(columns)}|\n".replace(" ", "")
    for cells, lines in zip(wanted.values(), shown[1::2], strict=True):
        assert lines.replace(" ", "").strip() == head + cells
    assert tables.markdown(table, ["ablation"]) == ""
    (point,) = plots.points_of([row | {"params": 9}])
    assert plots.legend([point]) == "a, 80 steps\nother text × 3.00\ncopying 44 %"


def test_a_plan_is_cut_to_what_is_asked_for() -> None:
    words = "--methods surgeon,flap --targets 0.2,0.5 --seeds 0,1 --steps 5 --shares 0.7,0.3"
    options = quality.parser_of().parse_args([*words.split(), "--data", "demo", "--data", "self"])
    plan = quality.adapted(quality.Plan(), options)
    cells = [*plan.untrained_cells(), *plan.trained_cells()]
    assert len(cells) == len(set(map(str, cells))) == 2 * 8
    assert {c.settings["method"] for c in cells} == {"surgeon", "flap"}
    assert {c.steps for c in plan.trained_cells()} == {5}
    assert plan.long_cells("flap") == []
    assert quality.setting_of(options).mixture() == (["demo", "self"], [0.7, 0.3])
    options.methods = "flap,nose"
    with pytest.raises(UserError, match="no method is called nose"):
        quality.adapted(quality.Plan(), options)
    options.shares = "0.7"
    with pytest.raises(UserError, match="pass one number above 0 for each"):
        quality.setting_of(options).mixture()


def test_a_folder_holds_the_table_of_one_setting(setting: Any, tmp_path: Path) -> None:
    runs.Bench(setting, tmp_path / "table")
    with pytest.raises(UserError, match="a table of other settings"):
        runs.Bench(dataclasses.replace(setting, length=64), tmp_path / "table")


@pytest.mark.slow
def test_the_command_runs_a_part_and_ends_with_a_json_line(
    setting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", setting.model, "--data", setting.data[0], "--length", "32", "--quick"]
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
    experts = {"reconstruction", "reap"}
    assert {r["label"] for r in line["untrained"]} == {*quality.METHODS} - experts
    assert "wanda" in captured.err
    assert quality.main([*options, "--set", "nonsense=1"]) == 2
    assert "unknown setting 'nonsense'" in capsys.readouterr().err


def test_a_front_keeps_what_no_other_beats() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 6.0), (2.5, 2.0), (4.0, 1.0)]
    assert plots.front(points) == [(1.0, 5.0), (2.5, 2.0), (3.0, 1.0)]
