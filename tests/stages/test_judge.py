"""What is judged of a pruned model beside the dense one, and what is left out."""

from __future__ import annotations

import pytest
import torch

from nuteprune.data.prompts import Prompts
from nuteprune.errors import UserError
from nuteprune.judge.context import Span
from nuteprune.stages import judge
from nuteprune.stages.judge import judge_beside


def test_what_can_be_measured_is(
    tiny_model, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny_model("llama", vocab_size=300, max_position_embeddings=256)
    random = torch.Generator().manual_seed(0)
    text = {x: torch.randint(3, 300, (4, 150), generator=random) for x in ("a", "b")}
    monkeypatch.setattr(judge, "SPANS", (Span(16, 4), Span(128, 8)))
    found = judge_beside(dense, dense, tiny_tokenizer, text, tokens=3, blocks=6)
    assert found.keys() == {"answers", "context", "samples"}
    assert found["context"].keys() == {"144"}  # blocks of 256 there are none
    assert found["context"]["144"]["protocol"]["blocks"] == 6
    how = found["answers"]["protocol"]
    assert (how["answers"], how["most_tokens"]) == (8, 3)
    assert [x["which"] for x in found["samples"]] == ["median", "worst"]


def test_what_cannot_is_left_out_unless_it_was_asked_for(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model("llama", vocab_size=300)
    nothing = judge_beside(model, model, tiny_tokenizer, {})
    assert nothing == {}
    long = Prompts(["a"], [[5] * 64], "of a test")
    with pytest.raises(UserError, match="64 positions"):
        judge_beside(model, model, tiny_tokenizer, {}, prompts=long)
