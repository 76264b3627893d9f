"""`nuteprune inspect` on checkpoints whose counts are known."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nuteprune.export.vocabulary import cut_model
from nuteprune.gates.budget import Budget
from nuteprune.model.anatomy import Anatomy
from nuteprune.stages.save import save
from nuteprune.stages.slice import Sliced
from tests.conftest import Run, json_line


@pytest.fixture
def run(run: Run) -> Run:
    """Calls `nuteprune inspect`."""
    return partial(run, "inspect")


def count(model: Any, *names: str) -> int:
    found = (p.numel() for n, p in model.named_parameters() if any(x in n for x in names))
    return sum(found)


def prune_and_write(
    prune: Callable, whole: Any, gates: tuple[str, ...], folder: Path, **record: Any
) -> Any:
    """Prune a model at random, write it with its record, and return what was written."""
    anatomy = Anatomy(whole)
    parameters, budget = {"before": anatomy.parameters()}, Budget.of(anatomy)
    defaults = {
        "shapes": "free",
        "base_model": "tiny",
        "perplexity": {"before": {}, "after": {}},
        "teachers": {"count": 3},
    }
    how = defaults | record
    small = prune(whole, gates, how["shapes"])
    sliced = Sliced(small, Anatomy(small).shape)
    how |= {"parameters": parameters, "stored_dtype": small.dtype}
    save(sliced, folder, None, budget=budget, target=0.3, **how)
    return small


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt"])
def test_parts_are_those_of_the_models(
    name: str, tiny_model: Callable, prune_at_random: Callable, tmp_path: Path, run: Callable
) -> None:
    whole = tiny_model(name)
    anatomy = Anatomy(whole)
    total = anatomy.parameters()
    paths = [p.path for p in anatomy.family.attention], [p.path for p in anatomy.family.mlp]
    ends = ("embed", "lm_head")
    old = [count(whole, *paths[0]), count(whole, *paths[1]), count(whole, *ends)]
    gates = {"gpt_neox": ("heads", "neurons"), "opt": ("heads", "mlp_block")}
    chosen = gates.get(name, ("kv_groups", "neurons", "hidden", "attn_block"))
    small = prune_and_write(prune_at_random, whole, chosen, tmp_path / "out")
    code, out, _ = run(tmp_path / "out", "--json")
    assert code == 0
    result = json_line(out)
    parts = result["parts"]
    new = [count(small, *paths[0]), count(small, *paths[1]), count(small, *ends)]
    names = ["attention", "MLP", "embedding and head"]
    assert [parts[x]["before"] for x in names] == old
    assert [parts[x]["after"] for x in names] == new
    assert parts["norms"] == {
        "before": total - sum(old),
        "after": sum(p.numel() for p in small.parameters()) - sum(new),
    }
    assert result["counted"] == result["params"]["after"]
    assert any(x.startswith("SGLang") for x in result["warnings"])


def test_latent_attention_is_counted_before_as_after(
    tiny_model: Callable, prune_at_random: Callable, tmp_path: Path, run: Callable
) -> None:
    whole = tiny_model("deepseek_v3")
    old = count(whole, *(p.path for p in Anatomy(whole).family.attention))
    prune_and_write(prune_at_random, whole, ("experts",), tmp_path / "out", shapes="uniform")
    code, out, err = run(tmp_path / "out", "--json")
    assert code == 0, err
    assert json_line(out)["parts"]["attention"] == {"before": old, "after": old}


def test_a_cut_of_the_vocabulary_takes_no_positions(
    tiny_model: Callable, tmp_path: Path, run: Callable
) -> None:
    def cut(model: Any, *_: Any) -> Any:
        return cut_model(Anatomy(model), range(40))

    whole, ends = tiny_model("opt"), ("embed", "lm_head")
    old, vocab = count(whole, *ends), {"before": 96, "after": 40, "covered": 1.0}
    small = prune_and_write(cut, whole, (), tmp_path / "out", shapes="uniform", vocab=vocab)
    code, out, err = run(tmp_path / "out", "--json")
    assert code == 0, err
    parts = json_line(out)["parts"]
    assert parts["embedding and head"] == {"before": old, "after": count(small, *ends)}


def test_it_prints_ranges_of_equal_layers_and_warnings(
    tiny_model: Callable, prune_at_random: Callable, tmp_path: Path, run: Callable
) -> None:
    whole = tiny_model("llama", num_hidden_layers=12)
    measured = {"before": {"text": 2.0}, "after": {"text": 3.0}}
    gates = ("neurons", "hidden")
    prune_and_write(
        prune_at_random, whole, gates, tmp_path / "out", shapes="uniform", perplexity=measured
    )
    code, out, _ = run(tmp_path / "out")
    assert code == 0
    assert " 0-11 " in out
    assert "Perplexity  text: 2.00 -> 3.00" in out
    assert "tensor-parallel sizes 1, 2" in out
    assert "WARNING     llama.cpp: --type q8_0 stores rows in blocks of 32" in out


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda x: x.write_bytes(x.read_bytes()[:-100]), "cannot load .*not fully covered"),
        (lambda x: x.write_bytes(b"12345"), "cannot load .*header too small"),
        (lambda x: x.unlink(), "no weights"),
        (lambda x: (x.parent / "config.json").write_text('{"a'), "cannot load .*JSON"),
        (lambda x: (x.parent / "nuteprune.json").write_text("{}"), "not of schema"),
    ],
    ids=["cut short", "cut to nothing", "no weights", "no config", "no record"],
)
def test_damage_is_one_line(
    harm: Callable[[Path], object],
    message: str,
    tiny_model: Callable,
    prune_at_random: Callable,
    tmp_path: Path,
    run: Callable,
) -> None:
    prune_and_write(prune_at_random, tiny_model("llama"), ("neurons",), tmp_path / "out")
    harm(tmp_path / "out" / "model.safetensors")
    code, _, err = run(tmp_path / "out")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err)
