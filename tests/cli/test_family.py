"""A type that is not listed, from its proposed entry to a pruned checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nuteprune
from nuteprune.errors import UserError
from nuteprune.export.loading import load_pruned
from nuteprune.jobs.family import config_of
from nuteprune.model import lookup
from nuteprune.model.family_file import read_family
from nuteprune.model.lookup import family_named
from nuteprune.model.small import small_config, small_model
from tests.conftest import json_line


@pytest.fixture(autouse=True)
def _nothing_brought_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_OWN", {})


@pytest.mark.slow
def test_a_type_that_is_not_listed_is_pruned_by_a_proposed_entry(
    tiny_tokenizer: Any, tmp_path: Path, run: Callable, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(config_of("cwm"))
    config.vocab_size = 300
    model, entry, out = tmp_path / "model", tmp_path / "entry.yaml", tmp_path / "out"
    small_model(config).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    asked = {"data": str(text), "sparsity": 0.3, "steps": 0, "length": 16, "dtype": "float32"}
    with pytest.raises(UserError, match=r"`nuteprune family MODEL` proposes an entry"):
        nuteprune.prune(str(model), out=out, quiet=True, **asked)

    code, stdout, err = run("family", model, "--out", entry, "--json")
    assert code == 0, err
    said = json_line(stdout)
    assert set(said) == {"model_type", "entry", "held", "failed"}
    assert said["held"]["hidden"] == said["held"]["heads"] == ["free", "uniform"]
    assert said["held"]["attn_block"] == ["free"]
    assert said["failed"] == {}
    assert read_family(entry).family.causal_lm == "CwmForCausalLM"

    gates = {"gates": "kv_groups,neurons,hidden", "neuron_multiple": 8, "hidden_multiple": 8}
    record = nuteprune.prune(str(model), out=out, family=entry, quiet=True, **asked, **gates)
    assert record is not None
    assert 0.3 <= record["sparsity"] < 0.35
    assert record["family"] == said["entry"]
    monkeypatch.setattr(lookup, "_OWN", {})  # as in another process
    ours = load_pruned(out)
    assert family_named("pruned_cwm").causal_lm == "CwmForCausalLM"
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    tokens = AutoTokenizer.from_pretrained(out)("the student", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    code, _, err = run("family", model, "--out", entry)  # it may have been mended since
    assert code == 2
    assert "exists; pass --overwrite to replace it" in err
    code, _, err = run("family", model, "--out", "")
    assert code == 2
    assert "is a folder; name the file" in err
    code, _, err = run("eval", out, "--data", text, "--family", entry)
    assert code == 2
    assert "has its entry; leave --family out" in err
    judged = ["--data", text, "--length", 16, "--blocks", 2, "--dtype", "float32"]
    code, _, err = run("eval", out, "--against", model, *judged)
    assert code == 0, err
    for dense, command in (
        (("eval", model), judged),
        (("bench", model), ["--lengths", 8, "--batch-sizes", 1, "--new-tokens", 2, "--repeats", 1]),
        (("plan", model), ["--sparsity", 0.3, "--length", 16]),
    ):
        monkeypatch.setattr(lookup, "_OWN", {})
        code, _, err = run(*dense, *command)
        assert code == 2
        assert "'cwm' is not supported" in err
        code, _, err = run(*dense, *command, "--family", entry)
        assert code == 0, err
    monkeypatch.setattr(lookup, "_OWN", {})
    code, stdout, err = run("inspect", out, "--json")
    assert code == 0, err
    assert json_line(stdout)["counted"] == record["params"]["after"]
