"""Recipes are settings that a run takes: each one is tried on a tiny model of its family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Run, json_line

RECIPES = Path(__file__).parents[2] / "recipes"
FAMILY = {
    "llama-7b": "llama_mha",
    "llama-3-8b": "llama",
    "qwen3-8b": "qwen3",
    "paper": "llama_mha",
    "progressive": "llama",
}
"""Recipe -> tiny model of `tests/conftest.py`."""
SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 256, "head_dim": 64}


def test_each_recipe_has_a_family() -> None:
    assert {path.stem for path in RECIPES.iterdir()} == set(FAMILY)


@pytest.mark.parametrize("recipe", FAMILY)
def test_a_dry_run_takes_it(
    recipe: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, run: Run
) -> None:
    model, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "out"
    tiny_model(FAMILY[recipe], intermediate_size=1280, **SIZES).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    text.write_text("\n\n\n".join(f"Document {i} says that {i} is a number. " for i in range(200)))
    path = RECIPES / f"{recipe}.yaml"
    # Of the recipe only what needs the hub, time or a larger model is changed.
    smaller = ["--data", text, "--length", "24", "--batch-size", "2", "--steps", "4"]
    here = ["--device", "cpu", "--dtype", "float32", "--dry-run", "--json"]
    asked = ["prune", model, "--config", path, "--out", out, *smaller, *here]
    code, stdout, stderr = run(*asked)
    assert code == 0, stderr
    found = json_line(stdout)
    settings = yaml.safe_load(path.read_text())
    assert found["targets"] == [settings["sparsity"]]
    assert settings["sparsity"] <= found["sparsity"][0] <= settings["sparsity"] + 0.05
    multiple = settings.get("neuron_multiple", 32)
    assert all(x["neurons"] % multiple == 0 for x in found["shape"][0]["layers"])
    assert not out.exists()
