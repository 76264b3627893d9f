"""Heads of a group in the place of tokens, and last tokens alone: what the stock model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nuteprune.model import forwards
from nuteprune.model.forwards import heads_as_tokens, last_logits, replaced
from tests.families import each_family

STOCK = ALL_ATTENTION_FUNCTIONS["sdpa"]
POSITIONS = 12


def decoded(
    model: PreTrainedModel, ids_BT: torch.Tensor, together: int, **options: torch.Tensor
) -> torch.Tensor:
    """Return the logits of the last position: some are read together, the others one by one."""
    first = {k: all_BT[:, :together] for k, all_BT in options.items()}
    made: Any = model(ids_BT[:, :together], use_cache=True, **first)
    for position in range(together, ids_BT.shape[1]):
        name = "cache" if "cache" in made else "past_key_values"  # by version
        mask = {k: all_BT[:, : position + 1] for k, all_BT in options.items()}
        made = model(ids_BT[:, position : position + 1], **{name: made[name]}, **mask)
    return made.logits[:, -1]


@torch.no_grad()
@each_family
def test_logits_are_the_stock_model_s(tiny_model, model_type: str) -> None:
    model = tiny_model(model_type)
    ids_BT = torch.arange(3, 3 + 2 * POSITIONS).view(2, POSITIONS)
    with heads_as_tokens():
        ours = decoded(model, ids_BT, 1)
    torch.testing.assert_close(ours, model(ids_BT).logits[:, -1], atol=1e-4, rtol=1e-4)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is STOCK


@torch.no_grad()
def test_a_token_s_keys_are_read_once_per_group(
    tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(module, query, key, *rest, **options):
        seen.append((tuple(query.shape), hasattr(module, "num_key_value_groups")))
        return STOCK(module, query, key, *rest, **options)

    monkeypatch.setattr(forwards, "sdpa_attention_forward", watched)
    model = tiny_model("llama")  # four heads of 8 in two groups
    with heads_as_tokens():
        decoded(model, torch.tensor([[5, 6, 7, 8]]), 3)
    several, one = ((1, 4, 3, 8), True), ((1, 2, 2, 8), False)
    assert seen == [several] * 3 + [one] * 3


@torch.no_grad()
def test_padding_stays_unseen(tiny_model) -> None:
    model = tiny_model("llama")
    ids_BT = torch.tensor([[0, 0, 5, 6, 7], [7, 8, 9, 10, 11]])
    mask_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    stock = model(ids_BT, attention_mask=mask_BT).logits[:, -1]
    with heads_as_tokens():
        ours = decoded(model, ids_BT, 3, attention_mask=mask_BT)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_the_stock_function_is_back_after_a_failure() -> None:
    def fail() -> None:
        with heads_as_tokens():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not STOCK
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is STOCK


@pytest.mark.parametrize("sequences", [1, 3])
def test_last_logits_are_the_stock_model_s_and_read_what_lies_together(
    sequences: int, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gemma2")  # which caps its logits
    ids = torch.arange(3, 3 + 12 * sequences).view(sequences, 12)
    with torch.no_grad():
        whole = model(ids).logits
        read, forward = [], model.lm_head.forward
        monkeypatch.setattr(model.lm_head, "forward", lambda x: read.append(x) or forward(x))
        apart = model(ids, logits_to_keep=5).logits
        ours = last_logits(model, ids, 5)
    width = model.config.hidden_size
    assert [x.stride() for x in read] == [(n * width, width, 1) for n in (12, 5)]
    torch.testing.assert_close(ours, whole[:, -5:])
    torch.testing.assert_close(ours, apart)
    assert not model.lm_head._forward_pre_hooks


def test_what_stands_in_for_values_leaves_them_and_their_order() -> None:
    """The order of a module's parameters is that of their names in files."""
    held = {"a": 1, "b": 2}
    with replaced([(held, "a", 3), (held, "a", 4), (held, "c", 5)]):
        assert held == {"a": 4, "b": 2, "c": 5}
    assert list(held.items()) == [("a", 1), ("b", 2)]
