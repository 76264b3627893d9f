"""Entries for types that are not listed: proposed, checked, and pruned by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nuteprune.console import Output
from nuteprune.errors import RunFailed, UserError
from nuteprune.jobs.family import checked, config_of, run
from nuteprune.model import lookup
from nuteprune.model.families import FAMILIES
from nuteprune.model.family_file import read_family, to_text

UNLISTED = [x for x in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if x not in FAMILIES]
AT_LEAST = 10
"""Types that are not listed and that a working entry is proposed for."""


@pytest.fixture(autouse=True)
def _nothing_brought_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_OWN", {})


def test_a_config_is_the_file_that_is_named(tmp_path: Path) -> None:
    for name, layers in (("config.json", 2), ("other.json", 3)):
        text = json.dumps({"model_type": "llama", "num_hidden_layers": layers})
        (tmp_path / name).write_text(text)
    found = [config_of(str(x)).num_hidden_layers for x in (tmp_path, tmp_path / "other.json")]
    assert found == [2, 3]


@pytest.mark.slow(2)
def test_what_does_not_hold_of_an_entry_is_refused_in_it(tmp_path: Path) -> None:
    """GPT-NeoX has queries, keys and values head by head: an entry that says otherwise is wrong."""
    text = to_text(FAMILIES["gpt_neox"]).replace("hidden -> qkv", "hidden -> q kv kv")
    (tmp_path / "entry.yaml").write_text(text)
    entry, found = checked(config_of("gpt_neox"), read_family(tmp_path / "entry.yaml"))
    assert "when tried, cutting changes the logits: off by" in str(entry.refusal("heads"))
    assert found["neurons"] == {"free": None, "uniform": None}
    assert entry.refusal("neurons") is None
    true, found = checked(config_of("gpt_neox"))
    assert true.attention[0].rows == ("qkv",)
    assert all(why is None for by in found.values() for why in by.values())


def test_an_entry_is_written_wherever_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, file = FAMILIES["llama"], tmp_path / "new" / "folder" / "entry.yaml"
    monkeypatch.setattr("nuteprune.jobs.family.checked", lambda *_: (entry, {}))
    run("llama", Output(quiet=True), out=file)
    assert read_family(file).family == entry
    with pytest.raises(UserError, match=r"new is a folder; name the file to write"):
        run("llama", Output(quiet=True), out=tmp_path / "new")
    with pytest.raises(UserError, match=r"cannot write .*entry.yaml.x: "):
        run("llama", Output(quiet=True), out=file / "x")


def test_an_entry_of_another_type_or_that_nothing_holds_of_is_refused(tmp_path: Path) -> None:
    (tmp_path / "entry.yaml").write_text(to_text(FAMILIES["llama"]))
    file = read_family(tmp_path / "entry.yaml")
    with pytest.raises(UserError, match="line 1: model_type: it is llama, and the model qwen2"):
        checked(config_of("qwen2"), file)
    text = to_text(FAMILIES["llama"]).replace("- deci", "- decci")
    (tmp_path / "entry.yaml").write_text(text)
    with pytest.raises(UserError, match="gguf: decci is not one of llama, deci"):
        checked(config_of("llama"), read_family(tmp_path / "entry.yaml"))
    with pytest.raises(UserError, match="no entry can describe phimoe: it has a mixture of exp"):
        config_of("phimoe")


@pytest.mark.hard
@pytest.mark.filterwarnings("default")
def test_every_type_that_is_not_listed_gets_an_entry_or_a_reason() -> None:
    working, refusals = [], {}
    for model_type in UNLISTED:
        try:
            entry, found = checked(config_of(model_type))
        except (UserError, RunFailed) as error:
            refusals[model_type] = str(error)
            continue
        assert entry.model_type == model_type
        if all(why is None for by in found.values() for why in by.values()):
            working.append(model_type)
    assert not [x for x, said in refusals.items() if "\n" in said or len(said) < len(x)]
    print(f"{len(working)} of {len(UNLISTED)} have a working entry: {', '.join(working)}")
    assert len(working) >= AT_LEAST
