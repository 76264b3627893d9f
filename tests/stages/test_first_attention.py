"""The first layer that has attention keeps it, also where layers of another kind come before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nuteprune.errors import UserError
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.allowed_shapes import Constraints
from nuteprune.gates.budget import Budget
from nuteprune.gates.importance import first_attention_last
from nuteprune.model.anatomy import Anatomy

LAYERS = {
    "lfm2": ["conv", "full_attention", "conv", "full_attention"],
    "qwen3_5_text": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}


@pytest.fixture(params=LAYERS)
def budget(request: pytest.FixtureRequest, tiny_model: Any) -> Budget:
    kinds = LAYERS[request.param]
    return Budget.of(Anatomy(tiny_model(request.param, layer_types=kinds, num_hidden_layers=4)))


def test_its_units_cost_more_than_all_others(budget: Budget) -> None:
    layout = Allocator(budget, Constraints(("kv_groups",))).layout
    assert layout.sizes["kv_groups"] == (0, 2, 0, 2)
    plain = torch.tensor([0.1, 0.3, 5.0, 4.0])
    raised = first_attention_last(layout, {"kv_groups": plain, "neurons": plain})
    torch.testing.assert_close(raised["kv_groups"], torch.tensor([5.1, 5.3, 5.0, 4.0]))
    assert raised["neurons"] is plain


def test_no_gate_removes_it(budget: Budget) -> None:
    allocator = Allocator(budget, Constraints(("attn_block",)))
    shape = allocator.shape(allocator.equal_scores(), allocator.maximum())
    assert [(x.heads > 0, x.mixer) for x in shape.layers] == [
        (False, False),
        (True, False),
        (False, False),
        (False, False),
    ]
    with pytest.raises(UserError, match="out of reach"):
        allocator.shape(allocator.equal_scores(), 0.99)
