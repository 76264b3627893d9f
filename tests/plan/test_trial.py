"""What a plan measures and counts of runs that have not begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from nuteprune import NutePruneConfig
from nuteprune.model.anatomy import Anatomy
from nuteprune.plan.need import Sizes
from nuteprune.plan.trial import seconds_per_step
from nuteprune.plan.walk import Walk
from tests.train.conftest import make

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"ramp_share": 0.5}],
    ids=lambda settings: "".join(settings) or "default",
)
def test_a_trial_step_is_one_of_training_and_leaves_nothing(
    settings: dict[str, Any], tiny_model, tmp_path: Path
) -> None:
    trainer = make(tiny_model("llama"), tmp_path, **settings)
    seen: list[bool] = []
    widths: list[int] = []
    down = trainer.anatomy.linear(1, trainer.anatomy.family.mlp[-1])
    down.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[-1]))
    layer = trainer.anatomy.layers[0].input_layernorm
    layer.register_forward_hook(lambda module, *_: seen.append(module.training))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items() if "lora" in k}
    assert seconds_per_step(trainer) > 0
    assert all(seen)
    plain = 3 * 2  # three steps, each of student and teacher
    assert len(seen) > plain if "gradient_checkpointing" in settings else len(seen) == plain
    if "ramp_share" not in settings:
        assert min(widths) < 48 == max(widths)  # the student's masks are fixed, as they will be
        assert trainer.masks is None
    assert not trainer.model.training
    after = trainer.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_what_stands_in_place_of_stacks_is_planned(tiny_model) -> None:
    config = AutoConfig.for_model(**tiny_model("qwen3_moe").config.to_dict())
    stacks = 2 * 6 * 32 * 24 * 2  # of two layers, in bfloat16
    peaks, sizes = [], []
    for gates in ("experts", "expert_neurons"):
        asked: dict[str, Any] = {"gates": gates, "neuron_multiple": 8, "hidden_multiple": 8}
        args = NutePruneConfig(output_dir="unused", use_cpu=True, target_sparsity=0.3, **asked)
        anatomy = Anatomy(tiny_model("qwen3_moe").bfloat16())
        sizes.append(Sizes.of(anatomy, args, 8, (gates,)).refitted)
        peaks.append(Walk(config, args, 8, torch.bfloat16).refit(1).peak)
    assert sizes[1] - sizes[0] == stacks
    assert peaks[1] - peaks[0] > 0.9 * stacks
