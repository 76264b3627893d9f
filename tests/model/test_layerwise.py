from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nuteprune.model import covariance
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.layerwise import Layerwise
from nuteprune.processes import ALONE


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_products_of_inputs_are_whole_whatever_panels_they_are_formed_in(
    name: str, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a norm follows (Gemma), each token counts by what the norm divides it by."""
    monkeypatch.setattr(covariance, "PANEL", 7)  # does not divide the 48 neurons
    anatomy = Anatomy(tiny_model(name))
    random = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, 90, (2, 10), generator=random) for _ in range(3)]
    text = Layerwise(anatomy, MaskHooks(anatomy), None, batches)
    last = anatomy.family.mlp[-1]
    (alone, _), down = text.covariance(0, last), anatomy.projection(0, last)
    seen: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    found = text.advance(0, {"mlp_block": down})["mlp_block"]
    handle.remove()
    inputs_MI = torch.cat(seen)
    assert inputs_MI.shape[0] == 60
    if name == "gemma3_text":
        output_MO = inputs_MI @ down.weight.T
        inputs_MI = inputs_MI / output_MO.square().mean(-1, keepdim=True).sqrt()
    for products in (alone, found):
        torch.testing.assert_close(products, inputs_MI.T @ inputs_MI)


def test_products_of_inputs_in_bf16_are_exact_where_they_are_inverted() -> None:
    random = torch.Generator().manual_seed(0)
    inputs_MI = torch.randn(64, 30, generator=random).bfloat16() + 1
    made = covariance.Covariance(30, torch.device("cpu"))
    made.add(inputs_MI)
    exact_II = inputs_MI.double().T @ inputs_MI.double()
    torch.testing.assert_close(made.whole(ALONE).double(), exact_II, rtol=1e-6, atol=1e-6)
    values_MD = torch.randn(64, 5, generator=random)
    found_DI = covariance.product(values_MD, inputs_MI)
    expected_DI = values_MD.double().T @ inputs_MI.double()
    assert found_DI.dtype == torch.float32
    torch.testing.assert_close(found_DI.double(), expected_DI, rtol=1e-2, atol=0.1)
    exact_DD = covariance.product(values_MD, values_MD)
    assert torch.equal(exact_DD, values_MD.T @ values_MD)
