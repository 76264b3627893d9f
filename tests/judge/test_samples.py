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


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
        {"repetition_penalty": 9.0},
    ],
    ids=str,
)
def test_what_a_checkpoint_says_of_generation_changes_no_sample(own: dict, tiny_model) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=259), ByT5Tokenizer()
    prompts = torch.tensor([[107, 108], [70, 80]])
    wanted = continuations(model, tokenizer, prompts)
    model.generation_config.update(**own)
    kept = model.generation_config
    assert continuations(model, tokenizer, prompts) == wanted
    assert model.generation_config is kept


def test_padding_that_the_model_has_not_is_not_read(tiny_model) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=259), ByT5Tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[more]"})
    assert tokenizer.pad_token_id >= 259
    prompts = torch.tensor([[107, 108], [70, 80]])
    first, other = (model(prompts).logits[:, -1]).argmax(-1).tolist()
    assert first != other
    model.generation_config.eos_token_id = first
    assert len(continuations(model, tokenizer, prompts)) == 2
