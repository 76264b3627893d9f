"""benchmarks/vocabulary.py on a tiny model: its figures against ones reckoned token by token."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nuteprune
from tests.scripts import script

_, _, vocabulary = map(script, ("quality_text", "quality_runs", "vocabulary"))


def nats(model: Any, tokenizer: Any, text: str) -> float:
    """Return a text's negative log-likelihood, one token after another."""
    ids, total = [tokenizer.eos_token_id], 0.0
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        with torch.no_grad():
            total -= float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
        ids.append(token)
    return total


@pytest.mark.slow(5)
def test_all_are_judged_by_the_same_characters(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    tiny_model("llama", vocab_size=300).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    (tmp_path / "words.txt").write_text("the teacher\n\n\n" * 20)
    other.mkdir()
    drawn = random.Random(0)
    lines = [" ".join(drawn.choices(["student", "learns", "pruned"], k=i + 2)) for i in range(9)]
    rows = "".join(json.dumps({"text": x}) + "\n" for x in lines)
    (other / "school.jsonl").write_text(rows)
    words = ["--model", model, "--data", tmp_path / "words.txt", "--keep", 270]
    words += ["--other-text", other, "--texts", 3, "--characters", 20, "--dtype", "float32"]
    result = vocabulary.main([str(x) for x in (*words, "--json", tmp_path / "found.json")])
    shown = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split("|")[1].strip() for line in shown] == ["tokens kept", "---", "300", "270"]
    nuteprune.vocab(str(model), out=tmp_path / "a", keep=270, data=str(tmp_path / "words.txt"))
    for row, folder in zip(result["rows"], (model, tmp_path / "a"), strict=True):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert row["parameters"] == sum(p.numel() for p in loaded.parameters())
        assert row["vocabulary"] == len(tokenizer)
        texts = lines[1::2]
        counts = [len(tokenizer(x, add_special_tokens=False).input_ids) for x in texts]
        assert row["tokens_per_text"] == {"school": sum(counts) / 4}
        few = [x[:20] for x in texts[:3]]
        expected = sum(nats(loaded, tokenizer, x) for x in few) / sum(map(len, few))
        assert row["nats_per_character"]["school"] == pytest.approx(expected, rel=1e-4)
    full, small = result["rows"]
    assert small["tokens_per_text"]["school"] > full["tokens_per_text"]["school"]
