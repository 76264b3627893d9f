"""The command that cuts vocabularies, and what can be done with what it writes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from textwrap import wrap
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import nuteprune
from nuteprune.errors import UserError
from nuteprune.export.loading import load_pruned
from nuteprune.judge.report import settings as settings_of
from tests.conftest import Run, json_of

pytestmark = pytest.mark.slow

KEEP = 280


@pytest.fixture(autouse=True)
def little_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.SELF_TOKENS", 100)
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.SELF_TOKENS_JUDGED", 50)


def test_a_stock_checkpoint_comes_out_that_all_else_takes(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "small"
    words = ("--data", text, "--keep", KEEP, "--out", out)
    found = json_of(run, "vocab", model, *words)
    loaded, dense = (AutoModelForCausalLM.from_pretrained(x) for x in (out, model))
    tokenizer, full = (AutoTokenizer.from_pretrained(x) for x in (out, model))
    assert type(loaded) is type(dense)
    assert len(tokenizer) == loaded.config.vocab_size == loaded.lm_head.weight.shape[0] == KEEP
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    for name in ("bos", "eos", "pad"):
        now = getattr(tokenizer, f"{name}_token")
        assert now == getattr(full, f"{name}_token")
        assert getattr(loaded.config, f"{name}_token_id") == tokenizer.convert_tokens_to_ids(now)
    said = "Teacher 3 is less pruned than student 4, naïveté."
    assert tokenizer.decode(tokenizer(said).input_ids) == full.decode(full(said).input_ids)
    # Each row is that of the same token.
    names = tokenizer.convert_ids_to_tokens(list(range(KEEP)))
    rows = dense.get_input_embeddings().weight[full.convert_tokens_to_ids(names)]
    assert torch.equal(rows, loaded.get_input_embeddings().weight)
    total = sum(p.numel() for p in dense.parameters())
    params = {"before": total, "after": total - 32 * (300 - KEEP)}
    assert found["params"].items() >= params.items()
    assert (found["vocab"]["before"], found["vocab"]["after"]) == (300, KEEP)
    assert 0.5 < found["vocab"]["covered"] <= 1
    bits = found["vocab"]["bits_per_character"]
    assert set(bits["before"]) == set(bits["after"]) == {"data", "own"}
    assert all(x > 0 for kinds in bits.values() for x in kinds.values())
    assert found["asked"] == {"kind": "vocab", "value": KEEP}
    assert f"vocabulary of {KEEP} tokens" in (out / "README.md").read_text()

    told = json_of(run, "inspect", out)
    assert told["counted"] == params["after"]
    assert told["parts"]["embedding and head"] == {"before": 32 * 300, "after": 32 * KEEP}
    few = ["--steps", 0, "--length", 24, "--device", "cpu", "--set", "calibration_blocks=2"]
    few += ["--set", "eval_blocks=2", "--set", "neuron_multiple=4", "--shares", 1]
    pruned = tmp_path / "pruned"
    again = json_of(run, "prune", out, "--sparsity", 0.2, "--data", text, "--out", pruned, *few)
    assert [x["vocab"]["after"] for x in again["history"]] == [KEEP]
    assert load_pruned(pruned).config.vocab_size == KEEP
    assert f"vocabulary of {KEEP} tokens" in (pruned / "README.md").read_text()
    whole = 1 - again["params"]["blocks_after"] / found["params"]["blocks_before"]
    assert f"In all      {whole:.3%} and " in run("inspect", pruned)[1]
    third = tmp_path / "third"
    twice = nuteprune.vocab(str(pruned), data=str(text), keep=270, out=third, quiet=True)
    assert Path(twice["out"]) == third
    assert [x["asked"]["kind"] for x in twice["history"]] == ["vocab", "sparsity"]
    assert load_pruned(third).config.vocab_size == 270
    tuned = tmp_path / "tuned"
    few = ["--data", text, "--steps", 1, "--length", 24, "--device", "cpu"]
    learned = json_of(run, "recover", out, "--out", tuned, *few)
    assert learned["recover"]["perplexity"]["protocol"]["block_length"] == {text.name: 24}
    exported = json_of(run, "export", third, "--to", "gguf", "--out", tmp_path / "a.gguf")
    assert exported["texts_compared"] > 0  # llama.cpp splits them alike


def test_a_token_beyond_the_embedding_goes(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[more]"})
    assert tokenizer.pad_token_id >= 300
    tokenizer.save_pretrained(model)
    out = tmp_path / "small"
    json_of(run, "vocab", model, "--data", text, "--keep", KEEP, "--out", out)
    small = AutoTokenizer.from_pretrained(out)
    assert len(small) == KEEP
    assert "[more]" not in small.get_vocab()


def test_settings_that_may_hold_token_ids_are_told(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    own = tmp_path / "model"
    shutil.copytree(model, own)
    settings = json.loads((own / "config.json").read_text()) | {"my_ends": [5, 9]}
    (own / "config.json").write_text(json.dumps(settings))
    out = tmp_path / "small"
    code, told, _ = run("vocab", own, "--data", text, "--keep", KEEP, "--out", out)
    assert code == 0
    notes = [x for x in told.splitlines() if x.startswith("Note")]
    assert len(notes) == 1
    assert notes[0].startswith("Note    my_ends in config.json is none of transformers' settings")


def test_the_models_own_text_can_be_counted(model: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "small"
    words = ["vocab", model, "--data", "self", "--keep", KEEP, "--length", 24, "--out", out]
    assert json_of(run, *words)["vocab"]["after"] == KEEP
    assert sorted(x.name for x in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize("most", [1e9, -1.0])
def test_auto_keeps_the_fewest_tokens_that_cost_little(
    most: float, model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.MOST_COST", most)
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.STEPS", 64)  # of 300 tokens few can go
    out = tmp_path / "small"
    words = ("vocab", model, "--data", text, "--keep", "auto", "--out", out)
    if most < 0:
        assert "pass a number in place of auto" in run(*words)[2]
        assert not out.exists()
        return
    found = json_of(run, *words)
    least = found["vocab"]["after"]
    assert found["config"]["keep"] == "auto"
    with pytest.raises(UserError, match="have to stay"):  # any size would do: the next one cannot
        nuteprune.vocab(str(model), data=str(text), keep=least - 5, out=tmp_path / "b", quiet=True)


FEW = ["--length", 24, "--batch-size", 2, "--device", "cpu", "--set", "calibration_blocks=2"]
FEW += ["--set", "eval_blocks=2", "--set", "neuron_multiple=4", "--shares", 1]


def test_one_run_does_what_vocab_and_prune_do_one_after_the_other(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    small, chained, out, again = (tmp_path / x for x in ("small", "chained", "out", "again"))
    how = ["--data", text, "--sparsity", 0.2, "--steps", 1, *FEW]
    words = ["--data", text, "--keep", KEEP, "--length", 24]
    cut = json_of(run, "vocab", model, *words, "--out", small)
    chain = json_of(run, "prune", small, *how, "--out", chained)
    found = json_of(run, "prune", model, *how, "--vocab", KEEP, "--out", out)
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (chained / "model.safetensors").read_bytes()
    for name in ("tokenizer.json", "config.json"):
        assert (out / name).read_bytes() == (chained / name).read_bytes()
    assert found["vocab"] == cut["vocab"]
    assert found["perplexity"] == chain["perplexity"]
    assert found["base_model"] == str(model)
    assert "history" not in found
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert found["params"] == {**chain["params"], "before": total}
    assert found["total_sparsity"] == pytest.approx(1 - found["params"]["after"] / total)
    assert set(found["stages"]) == {*chain["stages"], "vocab"}
    learned = chain["history"][0]["text"]["documents"]
    assert set(wrap(learned, 16)) <= set(wrap(found["text"]["documents"], 16))
    card = (out / "README.md").read_text()
    assert f"a vocabulary of {KEEP} tokens with distillation from the dense model" in card
    assert "Quality before is that of the base model with the smaller vocabulary." in card
    assert f"cut to {KEEP} of 300 tokens" in (out / "run" / "report.html").read_text()
    told = json_of(run, "inspect", out)
    assert told["parts"]["embedding and head"] == {"before": 32 * 300, "after": 32 * KEEP}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings_of(found)))
    settings = ("--config", tmp_path / "again.yaml", "--device", "cpu")
    assert json_of(run, "prune", model, *settings, "--out", again)["config"] == found["config"]
    assert (again / "model.safetensors").read_bytes() == weights


def test_rows_that_go_count_for_a_target_in_parameters(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    out, dense = tmp_path / "out", AutoModelForCausalLM.from_pretrained(model)
    total = sum(p.numel() for p in dense.parameters())
    how = ["prune", model, "--data", text, "--out", out, "--steps", 0, *FEW]
    how += ["--params", str(total - 2000)]
    whole = json_of(run, *how, "--dry-run")
    dry = json_of(run, *how, "--vocab", KEEP, "--dry-run")
    assert not out.exists()
    fewer = 32 * (300 - KEEP)
    assert whole["sparsity"][0] > dry["sparsity"][0]
    for plan in (whole, dry):
        assert total - 2400 < plan["parameters"][0] <= total - 2000
    code, said, err = run(*how, "--vocab", KEEP)
    assert code == 0, err
    assert json.loads((out / "nuteprune.json").read_text())["params"]["after"] <= total - 2000
    gone = json.loads((out / "nuteprune.json").read_text())["params"]
    assert gone["blocks_before"] - gone["blocks_after"] < 2400 - fewer
    for line in (
        f"Vocab   {KEEP} of 300 tokens; quality is compared with the model cut to these",
        f"Next    nuteprune eval {out} --against {out}/run/vocab --data YOUR_TEXT",
    ):
        assert line in said.splitlines()
    assert re.search(rf"tokens\W+300\W+{KEEP}\b", said)


def test_rows_that_go_are_parameters_that_a_token_went_through(
    tiny_model: Any, tiny_tokenizer: Any, text: Path, tmp_path: Path, run: Run
) -> None:
    model = tmp_path / "model"
    tiny_model("mixtral", vocab_size=300).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    how = ["prune", model, "--data", text, "--sparsity", 0.2, "--steps", 0, *FEW]
    dense = json_of(run, *how, "--out", tmp_path / "dense")["params"]
    found = json_of(run, *how, "--vocab", KEEP, "--out", tmp_path / "out")["params"]
    befores = ("before", "blocks_before", "active_before")
    assert [found[x] for x in befores] == [dense[x] for x in befores]
    assert found["active_after"] < dense["active_after"]


def test_several_targets_share_the_cut_model_and_another_run_replaces_it(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    few = {"calibration_blocks": 2, "eval_blocks": 2, "neuron_multiple": 4, "shares": [1.0]}
    how: dict[str, Any] = {"out": out, "data": str(text), "length": 24, "device": "cpu", **few}
    how |= {"batch_size": 2, "quiet": True}
    found = nuteprune.prune(str(model), sparsity=[0.1, 0.3], vocab=KEEP, steps=1, **how)
    assert found is not None
    for target in found["targets"]:
        assert target["vocab"]["after"] == load_pruned(target["out"]).config.vocab_size == KEEP
    nuteprune.prune(str(model), sparsity=0.2, vocab=KEEP - 5, steps=0, overwrite=True, **how)
    for folder in (out, out / "run" / "vocab"):
        assert load_pruned(folder).config.vocab_size == KEEP - 5
    assert not list(out.glob("sparsity-*"))


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_vocabulary_is_cut_once(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    how = ["prune", model, "--data", text, "--sparsity", 0.2, "--steps", 0, *FEW]
    asked = [*how, "--out", out, "--vocab", KEEP]
    expected = json_of(run, *how, "--out", whole, "--vocab", KEEP)
    with monkeypatch.context() as patch:  # half written
        patch.setattr("nuteprune.stages.save.write_texts", stop)
        assert run(*asked)[0] == 130
    assert "nothing to resume" in run(*asked, "--resume")[2]
    assert "pass --overwrite to replace it\n" in run(*asked)[2]
    with monkeypatch.context() as patch:  # before the run has settings
        patch.setattr("nuteprune.jobs.prune.begin", stop)
        assert run(*asked, "--overwrite")[0] == 130
        assert not (out / "run" / "settings.json").exists()
        before = (out / "run" / "vocab" / "nuteprune.json").stat().st_mtime_ns
        assert run(*asked, "--resume", "--vocab", KEEP + 1)[0] == 130  # another one is made anew
        assert (out / "run" / "vocab" / "nuteprune.json").stat().st_mtime_ns > before
        assert run(*asked, "--resume")[0] == 130
    with monkeypatch.context() as patch:
        patch.setattr("nuteprune.jobs.vocab.cut", stop)
        patch.setattr("nuteprune.run.Run.judge_dense", stop)
        assert run(*asked, "--resume")[0] == 130
        patch.undo()
        patch.setattr("nuteprune.jobs.vocab.cut", stop)
        for other, named in ((["--vocab", KEEP + 1], "vocab 280, not 281"), (["--length", 16], "")):
            code, _, err = run(*asked, "--resume", *other)
            assert (code, err.count("\n")) == (2, 1)
            assert (named or "length 24, not 16") in err
        code, _, err = run(*how, "--out", out, "--resume")
        assert "vocab 280, not None" in err
        code, said, err = run(*asked, "--resume")
        assert code == 0, err
    assert "Resumed vocab: done before" in said
    for name in ("model.safetensors", "run/settings.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((out / "nuteprune.json").read_text())["vocab"] == expected["vocab"]


def test_the_number_that_was_found_is_on_record(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.MOST_COST", 1e9)
    out, again = tmp_path / "out", tmp_path / "again"
    how = ["prune", model, "--data", text, "--sparsity", 0.2, "--steps", 0, *FEW]
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.STEPS", 16)
    found = json_of(run, *how, "--vocab", "auto", "--out", out)
    rows = load_pruned(out).config.vocab_size
    assert found["config"]["vocab"] == found["vocab"]["after"] == rows < 300
    json_of(run, *how, "--vocab", "auto", "--out", out, "--resume")
    json_of(run, *how, "--vocab", rows, "--out", again)
    weights = [(x / "model.safetensors").read_bytes() for x in (out, again)]
    assert weights[0] == weights[1]


REFUSED: dict[str, tuple[list[Any], str]] = {
    "no number": (["--vocab", "many"], "--vocab is many; pass a number of tokens, or auto"),
    "too few": (["--vocab", 100], "100 were asked for: pass at least"),
    "all": (["--vocab", 300], "the tokenizer has 300 tokens, not more than 300: pass fewer"),
    "too few, dry": (["--vocab", 100, "--dry-run"], "pass at least"),
    "auto, dry": (["--vocab", "auto", "--dry-run"], "pass a number in place of --vocab auto"),
    "bits, dry": (["--vocab", KEEP, "--dry-run", "--bits", 8], "leave out --bits, or --vocab"),
    "own text": (["--vocab", KEEP, "--own-text", "a.jsonl"], "was written with all tokens"),
    "steps": (["--vocab", KEEP, "--minutes", 5], "--minutes and --steps both say"),
    "before": (["--vocab", KEEP, "--set", "dataloader_persistent_workers=true"], "num_workers > 0"),
    "after": (["--vocab", "auto", "--params", "9000M"], "is no less than what the model has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pruned_with_fewer_tokens_is_one_line_and_nothing_is_written(
    case: str, model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.MOST_COST", 1e9)
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.STEPS", 16)
    words, expected = REFUSED[case]
    target = [] if "--params" in words else ["--sparsity", 0.2]
    how = ["prune", model, "--data", text, *target, "--steps", 1, *FEW, "--out", tmp_path / "out"]
    code, _, err = run(*how, *words)
    lines = [x for x in err.splitlines() if x.startswith("nuteprune: ")]
    assert (code, len(lines)) == (2, 1), err
    assert expected in lines[0]
    assert not (tmp_path / "out").exists()
    if case == "before":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("the user's")
        assert run(*how, *words, "--overwrite")[0] == 2
        assert [x.name for x in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("keep", [KEEP, "auto"])
def test_a_job_that_is_refused_after_the_cut_leaves_what_it_would_have_replaced(
    keep: Any, model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.MOST_COST", 1e9)
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.STEPS", 16)
    out = tmp_path / "out"
    how = ["prune", model, "--data", text, "--steps", 0, *FEW, "--out", out]
    json_of(run, *how, "--sparsity", 0.2, "--vocab", KEEP + 5)

    def content() -> dict[Path, bytes]:
        return {x: x.read_bytes() for x in out.rglob("*") if x.is_file()}

    before = content()
    again = [*how, "--vocab", keep, "--overwrite"]
    with monkeypatch.context() as patch:
        if keep == "auto":
            target = ("--params", "9000M")
        else:  # as too few minutes are, which cannot be told before
            target = ("--sparsity", 0.3)
            error = UserError("is too little time")
            patch.setattr("nuteprune.jobs.prune.print_plan", Mock(side_effect=error))
        code, _, err = run(*again, *target)
        assert (code, "is no less than" in err or "is too little time" in err) == (2, True), err
    assert content() == before
    found = json_of(run, *again, "--sparsity", 0.3)
    assert found["config"]["target_sparsity"] == 0.3
    assert not [x for x in out.iterdir() if x.name.startswith(".")]


def test_several_processes_do_not_cut_a_vocabulary(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    how = ["prune", model, "--data", text, "--sparsity", 0.2, "--out", tmp_path / "out"]
    code, _, err = run(*how, "--vocab", KEEP)
    assert (code, err.count("\n")) == (2, 1)
    assert "run nuteprune vocab first, then prune its result" in err
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_all_tokens(model: Path, tmp_path: Path, run: Run) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("vocab: 280\nsparsity: 0.2\n")
    code, _, err = run("plan", model, "--config", config)
    assert (code, "use prune --dry-run" in err) == (2, True)


BAD: dict[str, tuple[list[Any], str]] = {
    "too few": (["--keep", 100], "pass at least"),
    "all": (["--keep", 300], "pass fewer"),
    "no number": (["--keep", "many"], "--keep is many; pass a number of tokens, or auto"),
    "no text": (["--keep", KEEP, "--data", "no.txt"], "no.txt"),
    "nothing said": ([], "--keep"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    words, expected = BAD[case]
    named = [] if "--data" in words else ["--data", text]
    code, _, stderr = run("vocab", model, "--out", tmp_path / "out", *named, *words)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert (code, len(lines)) == (2, 1), stderr
    assert expected in lines[0]
    assert not (tmp_path / "out").exists()
