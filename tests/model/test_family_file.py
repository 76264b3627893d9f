from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nuteprune.errors import UserError
from nuteprune.model.families import FAMILIES
from nuteprune.model.family_file import from_dict, read_family, to_dict, to_text
from nuteprune.model.small import config_named, small_config, small_model
from tests.families import dense


@pytest.mark.parametrize("model_type", dense())
def test_an_entry_comes_back_from_its_file(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "entry.yaml").write_text(to_text(FAMILIES[model_type]))
    assert read_family(tmp_path / "entry.yaml").family == FAMILIES[model_type]
    assert from_dict(to_dict(FAMILIES[model_type]), tmp_path) == FAMILIES[model_type]


def test_what_did_not_hold_when_tried_comes_back_too(tmp_path: Path) -> None:
    """`nuteprune family` and `prune --family` add such."""
    found = {"heads": "when tried, no", "neurons uniform": "when tried, off by 2"}
    family = replace(FAMILIES["llama"], refused=found)
    (tmp_path / "entry.yaml").write_text(to_text(family))
    assert read_family(tmp_path / "entry.yaml").family == family
    assert from_dict(to_dict(family), tmp_path) == family
    assert family.refusal("neurons", uniform=True) == "when tried, off by 2"


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes LLaMA's entry with some text in place of other; returns the file."""

    def write(old: str, new: str) -> Path:
        text = to_text(FAMILIES["llama"])
        assert old in text
        (tmp_path / "entry.yaml").write_text(text.replace(old, new, 1))
        return tmp_path / "entry.yaml"

    return write


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("norm: rms\n", "norm: root\n", r"line \d+: norm: 'root' is not one of rms, rms_1p, layer"),
        (
            "final_norm:",
            "final_nrom:",
            "line 14: final_nrom: no such key; did you mean final_norm?",
        ),
        ("heads_divide_hidden: true", "heads_divide_hidden: 3", "3 must be true or false"),
        ("hidden -> kv", "hidden -> keys", "self_attn.k_proj: 'keys' is no axis; there are hidden"),
        ("hidden -> kv", "kv", "'kv': write it as 'hidden -> q'"),
        ("hidden -> kv", "neurons -> kv", "all but the last must read the residual stream"),
        ("q -> hidden", "q -> kv", "the last projection must write to the residual stream"),
        ("model_type: llama\n", "", "the key model_type is missing"),
        ("model_type: llama", "model_type: [", "is not valid YAML"),
        ("norm: rms\n", "refused: {moods: never}\n", "refused: moods: not one of heads, kv_groups"),
        ("norm: rms\n", "refused: {yes: never}\n", "refused: True: write this key in quotes"),
        ("norm: rms\n", "post_norms: [a]\n", "must be two names"),
        ("norm: rms\n", "experts: mlp.experts\n", "a file describes no mixtures of experts"),
        ("norm: rms\n", "config_names: {heads: 3}\n", "config_names: heads: 3 must be text"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_key(
    old: str, new: str, told: str, changed: Callable[[str, str], Path]
) -> None:
    file = changed(old, new)
    with pytest.raises(UserError, match=told.replace("?", r"\?").replace("[", r"\[")) as error:
        read_family(file)
    assert "entry.yaml" in str(error.value)
    assert "\n" not in str(error.value).partition("is not valid YAML")[0]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read --family .*none\.yaml"):
        read_family(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "model.layers",
            "model.blocks",
            "line 12: layers: model.blocks is not in a LlamaForCausal",
        ),
        (
            "self_attn.k_proj",
            "self_attn.keys",
            "self_attn.keys is not in a LlamaDecoderLayer: Llama",
        ),
        (
            "hidden -> kv",
            "hidden -> q",
            "k_proj: q would be 64 outputs in the model that was tried",
        ),
        ("hidden -> kv", "hidden -> mixer", "k_proj: mixer is an axis of mixers alone"),
        ("mlp.up_proj", "mlp.act_fn", "mlp: mlp.act_fn: it is a SiLU"),
        (
            "norm: rms\n",
            "attention_norms: [norm1]\n",
            "attention_norms: norm1 is not in a LlamaDec",
        ),
        (
            "norm: rms\n",
            "config_names: {heads: num_heads, neurons: intermediate_size, hidden: hidden_size}\n",
            "config_names: heads: the config has no num_heads",
        ),
        (
            "norm: rms\n",
            "config_names: {heads: num_attention_heads, hidden: hidden_size}\n",
            "config_names: it must name the config's neurons",
        ),
    ],
)
def test_what_a_model_does_not_have_is_told_with_its_line(
    old: str, new: str, told: str, changed: Callable[[str, str], Path]
) -> None:
    file = read_family(changed(old, new))
    config = small_config(config_named("llama"))
    with pytest.raises(UserError, match=told) as error:
        file.check_against(config, small_model(config))
    assert "entry.yaml, line" in str(error.value)
