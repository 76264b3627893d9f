"""Weights beside the base's: LoRA, and those of a refit, which the student alone has."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from nuteprune.errors import UserError
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.lora import LoraBank
from nuteprune.model.trainable import add_lora, sides_of
from nuteprune.shrink.finalize import merge_layer

MAPS = Path("/proc/self/maps")
TOKENS = torch.arange(3, 27).view(2, 12)


def wrapped(model):
    torch.manual_seed(1)
    return add_lora(Anatomy(model.requires_grad_(False)), r=2)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def changed(bank: LoraBank, anatomy: Anatomy) -> torch.Tensor:
    """Put another weight in place of layer 1's down projection; returns it."""
    down = anatomy.family.mlp[-1]
    old = anatomy.linear(1, down).weight
    new = old + 0.05 * torch.randn(old.shape)
    bank.set_weight(1, down, new)
    return new


def test_a_weight_in_place_is_the_student_s_alone(tiny_model) -> None:
    model = wrapped(tiny_model("llama"))
    anatomy = Anatomy(model)
    bank, before = LoraBank(anatomy), logits(tiny_model("llama"))
    new = changed(bank, anatomy)
    by_hand = tiny_model("llama")
    by_hand.model.layers[1].mlp.down_proj.weight.data.copy_(new)
    torch.testing.assert_close(logits(model), logits(by_hand))
    with bank.using(0, None), bank.using(1, None), bank.using(2, None):
        assert torch.equal(logits(model), before)  # the dense model is whole
    torch.testing.assert_close(logits(model), logits(by_hand))
    bank.clear()
    assert torch.equal(logits(model), before)


def test_lora_is_left_out_where_it_adds_nothing(tiny_model) -> None:
    model = wrapped(tiny_model("llama"))
    anatomy = Anatomy(model)
    bank, down = LoraBank(anatomy), anatomy.family.mlp[-1]
    trained = anatomy.projection(1, down)
    torch.nn.init.normal_(sides_of(trained)[1])
    before, asked = logits(model), []
    for place in bank._places.values():
        side = place.lora.lora_A["default"]
        side.register_forward_hook(lambda *_, lora=place.lora: asked.append(lora))
    with bank.silent_left_out():
        assert torch.equal(logits(model), before)
        assert asked == [trained]
        new = changed(bank, anatomy)  # it adds nothing any more
        by_hand = tiny_model("llama")
        by_hand.model.layers[1].mlp.down_proj.weight.data.copy_(new)
        torch.testing.assert_close(logits(model), logits(by_hand))
    logits(model)
    assert set(asked) == {place.lora for place in bank._places.values()}


@pytest.mark.skipif(not MAPS.is_file(), reason="asks Linux what is mapped")
def test_a_weight_in_place_is_read_from_a_file_that_goes_with_it(
    tiny_model, tmp_path: Path
) -> None:
    anatomy = Anatomy(wrapped(tiny_model("llama")))
    bank = LoraBank(anatomy, tmp_path)
    new = changed(bank, anatomy)
    assert torch.equal(anatomy.linear(1, anatomy.family.mlp[-1]).weight, new)
    assert str(tmp_path) in MAPS.read_text()
    assert list(tmp_path.iterdir()) == []  # its name is gone already
    bank.clear()
    gc.collect()
    assert str(tmp_path) not in MAPS.read_text()


def test_state_and_load_are_the_same_student_to_the_bit(tiny_model) -> None:
    first, second = wrapped(tiny_model("llama")), wrapped(tiny_model("llama"))
    bank = LoraBank(Anatomy(first))
    changed(bank, Anatomy(first))
    for name, value in bank.state().items():
        if name.endswith(".B"):
            value.data.normal_(std=0.02)
    LoraBank(Anatomy(second)).load({k: v.clone() for k, v in bank.state().items()})
    assert torch.equal(logits(first), logits(second))
    with pytest.raises(UserError, match="not those of this model"):
        LoraBank(Anatomy(wrapped(tiny_model("llama", num_hidden_layers=2)))).load(bank.state())


def test_a_base_that_is_more_exact_stays_so(tiny_model) -> None:
    """What was refitted in bfloat16 is a change of the stored weights, not a rounding of them."""
    half = wrapped(tiny_model("llama").bfloat16())
    bank, down = LoraBank(Anatomy(half)), Anatomy(half).family.mlp[-1]
    same = Anatomy(half).linear(1, down).weight.clone()  # a refit that changes nothing
    bank.set_weight(1, down, same)
    exact = Anatomy(tiny_model("llama"))
    before = exact.linear(1, down).weight.clone()
    merge_layer(exact, 1, bank.learned(), torch.bfloat16)
    assert torch.equal(exact.linear(1, down).weight, before)
    assert not torch.equal(before, same.float())
