"""`nuteprune inspect` on checkpoints whose counts are known."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nuteprune.cli.app import main
from nuteprune.export.record import write_pruned
from nuteprune.gates.budget import Budget
from nuteprune.model.anatomy import Anatomy


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def call(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nuteprune", "inspect", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def count(model: Any, *names: str) -> int:
    found = (p.numel() for n, p in model.named_parameters() if any(x in n for x in names))
    return sum(found)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt"])
def test_parts_are_those_of_the_models(
    name: str, tiny_model: Callable, prune_at_random: Callable, tmp_path: Path, run: Callable
) -> None:
    whole = tiny_model(name)
    anatomy = Anatomy(whole)
    before, total = anatomy.shape, anatomy.parameters()
    blocks = Budget.of(anatomy).before
    paths = [p.path for p in anatomy.family.attention], [p.path for p in anatomy.family.mlp]
    ends = ("embed", "lm_head")
    old = [count(whole, *paths[0]), count(whole, *paths[1]), count(whole, *ends)]
    gates = {"gpt_neox": ("heads", "neurons"), "opt": ("heads", "mlp_block")}
    chosen = gates.get(name, ("kv_groups", "neurons", "hidden", "attn_block"))
    small = prune_at_random(whole, chosen, "free")
    write_pruned(
        tmp_path / "out",
        small,
        None,
        {"before": total, "blocks_before": blocks},
        target=0.3,
        before=before,
        after=Anatomy(small).shape,
        shapes="free",
        base_model="tiny",
        perplexity={"before": {}, "after": {}},
        teachers={"count": 3},
    )
    code, out, _ = run(tmp_path / "out", "--json")
    assert code == 0
    result = json.loads(out.splitlines()[-1])
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


def test_it_prints_ranges_of_equal_layers_and_warnings(
    tiny_model: Callable, prune_at_random: Callable, tmp_path: Path, run: Callable
) -> None:
    whole = tiny_model("llama", num_hidden_layers=12)
    anatomy = Anatomy(whole)
    before = {"before": anatomy.parameters(), "blocks_before": Budget.of(anatomy).before}
    shape = anatomy.shape
    small = prune_at_random(whole, ("neurons", "hidden"), "uniform")
    write_pruned(
        tmp_path / "out",
        small,
        None,
        before,
        target=0.3,
        before=shape,
        after=Anatomy(small).shape,
        shapes="uniform",
        base_model="tiny",
        perplexity={"before": {"text": 2.0}, "after": {"text": 3.0}},
        teachers={"count": 0},
    )
    code, out, _ = run(tmp_path / "out")
    assert code == 0
    assert " 0-11 " in out
    assert "Perplexity  text: 2.00 -> 3.00" in out
    assert "tensor-parallel sizes 1, 2" in out
    assert "WARNING     llama.cpp: --type q8_0 stores rows in blocks of 32" in out
