"""Every family through the command line: what can be reached, and dimensions of one's choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nuteprune.export.loading import load_pruned
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import GATE_KINDS
from nuteprune.model.shape import Shape
from tests.conftest import json_line
from tests.families import each_family

SETTINGS = {"--data": None, "--steps": 0, "--batch-size": 1, "--length": 16, "--dtype": "float32"}
MULTIPLES = ("--set", "neuron_multiple=4", "--set", "hidden_multiple=8", "--json")


@pytest.fixture
def saved(tiny_model: Callable, tiny_tokenizer: Any, tmp_path: Path) -> Callable[[str], Path]:
    """Saves the tiny model of a family, with a tokenizer; returns the folder."""

    def save(model_type: str) -> Path:
        tiny_model(model_type, vocab_size=300).save_pretrained(tmp_path / "model")
        tiny_tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def options(text: Path, **more: Any) -> list[Any]:
    given = SETTINGS | {"--data": text} | {f"--{name}": value for name, value in more.items()}
    return [*(x for pair in given.items() for x in pair), *MULTIPLES]


@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["free", "uniform"])
@each_family
def test_a_dry_run_says_what_is_reached_or_which_gates_cannot_be(
    model_type: str, shapes: str, saved: Callable, text: Path, tmp_path: Path, run: Callable
) -> None:
    family, model = FAMILIES[model_type], saved(model_type)
    before = sorted(tmp_path.rglob("*"))
    reasons = {kind: family.refusal(kind, uniform=shapes == "uniform") for kind in GATE_KINDS}
    refused = {kind: reason for kind, reason in reasons.items() if reason is not None}
    taken = ",".join(kind for kind in GATE_KINDS if kind not in refused)
    for gates, reason in (refused | {taken: None}).items():
        given = options(text, sparsity=0.02, gates=gates, shapes=shapes, out=tmp_path / "out")
        code, stdout, err = run("prune", model, *given, "--dry-run")
        if reason is not None:
            assert code == 2
            assert reason in err
            continue
        assert code == 0, err
        result = json_line(stdout)
        assert result["sparsity"][0] >= 0.02
        assert Shape.from_dict(result["shape"][0]).uniform or shapes == "free"
    assert sorted(tmp_path.rglob("*")) == before


# What is cut is tested for all families in tests/shrink: here, with groups of heads and without.
@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "gpt_neox"])
def test_dimensions_of_the_users_choice(
    model_type: str, saved: Callable, text: Path, tmp_path: Path, run: Callable
) -> None:
    family, model = FAMILIES[model_type], saved(model_type)
    grouped = "kv_heads" in family.config_names
    rows = [
        {"heads": 2, "kv_heads": 1 if grouped else 2, "neurons": 20},
        {"heads": 0, "kv_heads": 0, "neurons": 48},
        {"heads": 2, "kv_heads": 2, "neurons": 0},
    ]
    wanted: dict[str, Any] = {"layers": rows}
    if family.refusal("hidden") is None:
        wanted["hidden"] = 24
    (tmp_path / "shape.yaml").write_text(json.dumps(wanted))
    out = tmp_path / "out"
    code, _, err = run("prune", model, *options(text, shape=tmp_path / "shape.yaml", out=out))
    assert code == 0, err
    found = Anatomy(load_pruned(out)).shape
    assert [{k: getattr(x, k) for k in rows[0]} for x in found.layers] == rows
    assert found.hidden == wanted.get("hidden", 32)
    record = json.loads((out / "nuteprune.json").read_text())
    assert [{k: x[k] for k in rows[0]} for x in record["layers"]] == rows
