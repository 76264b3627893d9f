"""Texts whose words are tokens, files of them, and three embedded sources that are small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nuteprune.data import demo as assets
from nuteprune.data.specs import iter_documents

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
WORDS = 2000


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per word: w7 -> id 7."""
    vocabulary = {f"w{i}": i for i in range(WORDS)}
    vocabulary |= {token: WORDS + i for i, token in enumerate(["<unk>", *special.values()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", model_max_length=8, **special
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(eos_token="</s>", bos_token="<s>")


def words(start: int, count: int) -> str:
    return " ".join(f"w{i % WORDS}" for i in range(start, start + count))


def write_text(folder: Path, documents: list[str], name: str = "a.txt") -> str:
    path = folder / name
    path.write_text("\n\n\n".join(documents))
    return str(path)


def write_rows(folder: Path, rows: list[object], name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def only(spec: str, **options: Any) -> list[str]:
    (documents,) = iter_documents(spec, **options).values()
    return list(documents)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    texts = {
        name: [words(start + 10 * i, 10) for i in range(60)]
        for name, start in [("wikipedia", 0), ("speeches", 600), ("recipes", 1200)]
    }
    monkeypatch.setattr(assets, "documents", lambda domains: {x: texts[x] for x in domains})
    return texts
