"""Tokenizers of checkpoints: for older programs too, and without remote code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nuteprune.export.card import model_card
from nuteprune.export.checkpoint import plain_merges, save
from tests.forked import python

from .conftest import said_by_transformers
from .test_card import a_record

ROOT = Path(__file__).parents[2]
TEXT = "café 1234 the student learns\n  def f(x): return 2"


@pytest.fixture
def folder(case: Callable, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint of free shapes whose modeling file must not be run."""
    save(case("llama").pruned, tmp_path / "model", tiny_tokenizer)
    (tmp_path / "model" / "modeling_pruned.py").write_text("raise SystemExit('it was run')\n")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ["tiny_tokenizer", "sentencepiece_tokenizer"])
def test_merges_are_lines_which_every_version_reads(
    kind: str, request: pytest.FixtureRequest, case: Callable, tmp_path: Path
) -> None:
    tokenizer = request.getfixturevalue(kind)
    save(case("llama").pruned, tmp_path / "model", tokenizer)
    merges = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["merges"]
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert len(merges) > 5
    assert merges == [f"{left} {right}" for left, right in pairs]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=False)
    assert loaded(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert loaded.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "merges": [["a", "b"], ["a b", "c"]]},  # a line could not tell
        {"type": "BPE", "merges": ["a b"]},
        {"type": "BPE", "merges": []},
        {"type": "Unigram"},
    ],
)
def test_what_cannot_be_or_is_written_in_lines_stays(model: dict[str, Any]) -> None:
    assert plain_merges({"model": model}) == {"model": model}


def test_told_so_no_code_is_run_and_nobody_is_asked(
    folder: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert tokenizer(TEXT).input_ids == tiny_tokenizer(TEXT).input_ids
    assert asked == []
    # Why the docs have it there: if this fails, they need not say so any more.
    AutoTokenizer.from_pretrained(folder)
    assert len(asked) == 1
    assert "custom code" in asked[0]


def test_wherever_a_tokenizer_is_loaded_it_is_told_so() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = {page.name: page.read_text() for page in pages}
    texts["card"] = model_card(a_record(), remote_code=True)
    ours = re.compile(r'AutoTokenizer\.from_pretrained\((?:"small"|"PRUNED"|folder).*')
    found = {name: ours.findall(text) for name, text in texts.items()}
    assert {"README.md", "serving.md", "card"} <= {name for name in found if found[name]}
    assert all(", trust_remote_code=False)" in x for lines in found.values() for x in lines)


GATES = {
    "llama": ("kv_groups", "heads", "neurons", "mlp_block"),
    "gemma2": ("kv_groups", "neurons"),
    "qwen3_moe": ("experts", "kv_groups"),  # whose modules read counts by another name
}
PIPELINE = """
import transformers
transformers.logging.disable_progress_bar()
write = transformers.pipeline("text-generation", model={folder!r}, trust_remote_code=True)
assert type(write.model).__name__.startswith("Pruned")
assert write("the student", max_new_tokens=2, do_sample=False)[0]["generated_text"]
"""


@pytest.fixture
def small(
    tiny_model: Callable, tiny_tokenizer: Any, prune_at_random: Callable, tmp_path: Path
) -> Callable[[str], Path]:
    """Writes a checkpoint of a family with its tokenizer; its layers differ in size."""

    def make(name: str) -> Path:
        model = prune_at_random(tiny_model(name, vocab_size=300), GATES[name], "free")
        assert model.config.model_type == f"pruned_{name}"
        save(model, tmp_path / "model", tiny_tokenizer)
        return tmp_path / "model"

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", list(GATES))
def test_transformers_has_nothing_to_say_of_free_shapes(
    name: str, small: Callable[[str], Path]
) -> None:
    folder = small(name)
    assert said_by_transformers(folder, "AutoModelForCausalLM") == (0, "", "")
    ended = python("-c", PIPELINE.format(folder=str(folder)))
    assert (ended.code, ended.out, ended.err) == (0, "", "")


@pytest.mark.slow
def test_what_transformers_says_is_heard(small: Callable[[str], Path]) -> None:
    """The test above can fail: with a config that does not spare them, both warnings are there."""
    folder = small("llama")
    config = json.loads((folder / "config.json").read_text())
    del config["without_code"]
    (folder / "config.json").write_text(json.dumps(config))
    modeling = folder / "modeling_pruned.py"
    modeling.write_text(modeling.read_text().replace("own[stored] if is_count else ", ""))
    code, _, said = said_by_transformers(folder, "AutoModelForCausalLM")
    assert code == 0
    assert "to instantiate a model of type" in said
    assert "Reading global config value for per-layer attribute" in said
