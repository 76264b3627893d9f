"""The learning rate where none is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nuteprune import NutePruneConfig
from nuteprune.model.anatomy import Anatomy
from nuteprune.train.prepare import RATE, gain, prepare, usual_rate


def test_a_gain_is_how_much_larger_random_inputs_come_out() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(300, 400, bias=False)
    nn.init.normal_(linear.weight, std=0.7)
    inputs = torch.randn(500, 300)
    with torch.no_grad():
        found = linear(inputs).square().mean().sqrt() / inputs.square().mean().sqrt()
    assert gain(linear) == pytest.approx(float(found), rel=0.02)


def test_the_rate_goes_with_the_weights(tiny_model: Callable, tmp_path: Path) -> None:
    model = tiny_model("llama")
    anatomy = Anatomy(model)
    for i in range(len(anatomy.layers)):
        for projection in anatomy.family.projections:
            linear = anatomy.linear(i, projection)
            assert linear is not None
            nn.init.normal_(linear.weight, std=3 / linear.in_features**0.5)
    assert usual_rate(anatomy) == pytest.approx(3 * RATE, rel=0.05)
    config = NutePruneConfig(output_dir=str(tmp_path), target_sparsity=0.2, use_cpu=True)
    assert config.learning_rate is None
    prepare(model, config)
    assert config.learning_rate == pytest.approx(3 * RATE, rel=0.05)


def test_a_rate_that_is_given_stays(tiny_model: Callable, tmp_path: Path) -> None:
    how = {"output_dir": str(tmp_path), "target_sparsity": 0.2, "use_cpu": True}
    config = NutePruneConfig(learning_rate=0.5, **how)
    prepare(tiny_model("llama"), config)
    assert config.learning_rate == 0.5
