"""The command that cuts vocabularies, and what can be done with what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nuteprune
from nuteprune.errors import UserError
from nuteprune.export.loading import load_pruned
from tests.conftest import Run, json_of

pytestmark = pytest.mark.slow

KEEP = 280


@pytest.fixture(autouse=True)
def little_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nuteprune.jobs.vocab_text.SELF_TOKENS", 100)
    monkeypatch.setattr("nuteprune.jobs.vocab_text.SELF_TOKENS_JUDGED", 50)


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
        assert "pass a number in place of --keep auto" in run(*words)[2]
        assert not out.exists()
        return
    found = json_of(run, *words)
    least = found["vocab"]["after"]
    assert found["config"]["keep"] == "auto"
    with pytest.raises(UserError, match="have to stay"):  # any size would do: the next one cannot
        nuteprune.vocab(str(model), data=str(text), keep=least - 5, out=tmp_path / "b", quiet=True)


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
