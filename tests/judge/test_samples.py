from __future__ import annotations

import pytest
import torch
from transformers import ByT5Tokenizer

from nuteprune.data.tokens import texts_of
from nuteprune.judge.samples import continuations, side_by_side


def test_tokens_that_a_tokenizer_does_not_know_are_no_text(tiny_model) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=512), ByT5Tokenizer()
    with pytest.raises(ValueError, match="range"):
        tokenizer.decode([500])
    with torch.no_grad():  # one of the two always wins
        model.lm_head.weight.zero_()
        model.lm_head.weight[500], model.lm_head.weight[501] = 1, -1
    prompts = torch.tensor([[107, 108]])
    assert continuations(model, tokenizer, prompts, new_tokens=3) == [""]
    assert side_by_side(tokenizer, prompts, ["a"], [""])[0]["prompt"] == "hi"
    assert texts_of(tokenizer, [[107], [500], [108]]) == ["h", "", "i"]
