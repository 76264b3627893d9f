from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nuteprune.model.hooks import Selection, narrow_linear

ROWS, COLUMNS = torch.tensor([0, 2, 3]), torch.tensor([1, 4, 5, 6])
each_part = pytest.mark.parametrize(
    "selected", [(ROWS, None), (None, COLUMNS), (ROWS, COLUMNS)], ids=["rows", "columns", "both"]
)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, selected: Selection) -> Tensor:
    """All rows and columns, of which some are picked or stay 0."""
    rows, columns = (slice(None) if part is None else part for part in selected)
    wide = torch.zeros(*x.shape[:-1], weight.shape[1], dtype=x.dtype)
    wide[..., columns] = x
    return F.linear(wide, weight, bias)[..., rows]


@each_part
@pytest.mark.parametrize("trained", [False, True])
def test_it_is_the_linear_map_between_what_is_kept(selected: Selection, trained: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8 if selected[1] is None else len(COLUMNS), requires_grad=True)
    weight, bias = torch.randn(5, 8, requires_grad=trained), torch.randn(5)
    found = []
    for run in (narrow_linear, by_hand):
        x.grad = weight.grad = None
        output = run(x, weight, bias, selected)
        output.square().sum().backward()
        found.append([output, x.grad, weight.grad])
    torch.testing.assert_close(found[0], found[1])


@each_part
def test_no_copy_of_a_frozen_weight_waits_for_the_backward_pass(selected: Selection) -> None:
    weight, bias = torch.randn(5, 8), torch.randn(5)
    x = torch.randn(2, 8 if selected[1] is None else len(COLUMNS), requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        narrow_linear(x, weight, bias, selected)
    assert saved
    given = {part.data_ptr() for part in (weight, *selected) if part is not None}
    assert {tensor.data_ptr() for tensor in saved} == given


@pytest.mark.parametrize("trained", [False, True])
def test_it_computes_as_autocast_says_and_gradients_keep_their_dtype(trained: bool) -> None:
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(5, 8, requires_grad=trained)
    with torch.autocast("cpu", torch.bfloat16):
        output = narrow_linear(x, weight, torch.randn(5), (ROWS, None))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert not trained or weight.grad.dtype == torch.float32
