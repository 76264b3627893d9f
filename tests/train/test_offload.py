"""A run whose frozen layers stay off its device: the same one, with a layer at a time there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune import NutePruneConfig, NutePruneTrainer, UserError
from tests.second_device import DEVICE, second_device

from .conftest import make, metrics

slow, hard, param = pytest.mark.slow, pytest.mark.hard, pytest.param
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is dep:FutureWarning")


def written(model: Any, out: Path, stored: str, **settings: Any) -> tuple[bytes, list[Any]]:
    """Return the weights' file of a run, and the losses of its steps."""
    settings = {"max_steps": 2, "logging_steps": 1, **settings}
    trainer = make(model, out / "run", stored_dtype=getattr(torch, stored), **settings)
    if trainer.args.max_steps:
        trainer.train()
    trainer.finalize()
    trainer.save_pruned(out / "out")
    losses = [x["loss"] for x in metrics(out / "run")] if trainer.args.max_steps else []
    return (out / "out/model.safetensors").read_bytes(), losses


@pytest.mark.parametrize(
    ("model_type", "stored", "settings"),
    [
        param("llama", "float32", {"gradient_checkpointing": True}, marks=slow(2)),
        param("llama", "bfloat16", {"ramp_share": 0.5}, marks=slow(2)),
        # Scored in rounds.
        param("llama", "float32", {"target_sparsity": 0.5, "max_steps": 0}, marks=slow(3)),
        param("llama", "bfloat16", {"gate_type": "hard_concrete"}, marks=hard),
        param("llama", "float32", {"method": "wanda"}, marks=hard),
        param("qwen3_moe", "bfloat16", {"neuron_multiple": 8}, marks=hard),
        param(
            *("qwen3_moe", "bfloat16", {"neuron_multiple": 8, "gates": "expert_neurons"}),
            marks=slow(3),
        ),
    ],
)
def test_a_run_on_a_cpu_writes_the_same(
    model_type: str,
    stored: str,
    settings: dict[str, Any],
    tiny_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    plain, away = (
        written(tiny_model(model_type), tmp_path / str(x), stored, offload=x, **settings)
        for x in (False, True)
    )
    assert plain == away


LAYERS, LAYER = 5, 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
"""Layers of the model, and the bytes of each one's matrices."""


@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True, "ramp_share": 1.0, "refit": False}],
    ids=["refitted", "checkpointing"],
)
def test_a_layer_at_a_time_is_on_the_device(
    settings: dict[str, Any],
    tiny_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fewer = {"gates": "neurons", "lora_rank": 2, "calibration_blocks": 2}
    settings = {"max_steps": 2, "logging_steps": 1, **fewer, **settings}
    model = partial(tiny_model, "llama", attn_implementation="eager", num_hidden_layers=LAYERS)
    losses, came, most = [], [], []

    def train(name: str, model: Any, **more: Any) -> Any:
        trainer = make(model, tmp_path / name, **settings, **more)
        trainer.begin()
        before = device.arrived
        trainer.train()
        came.append(device.arrived - before)
        losses.append([x["loss"] for x in metrics(tmp_path / name)])
        state = trainer.prepared.bank.state()
        parts = [x for name, x in state.items() if not name.endswith(".W")]
        parts += [trainer.anatomy.embedding.weight, trainer.anatomy.head.weight]
        most.append(device.arrivals.peak - sum(x.nbytes for x in parts))
        return trainer.finalize().state_dict()

    with second_device(monkeypatch) as device:
        plain = train("plain", model().to(DEVICE))
    with second_device(monkeypatch) as device:
        away = train("away", model(), offload=True)
    assert losses[0] == losses[1]
    assert all(torch.equal(x, plain[name].inner) for name, x in away.items())
    assert 0 < most[1] < 2 * LAYER  # as `jobs.plan.offloaded` has it
    if settings.get("gradient_checkpointing"):
        # Each comes once for both roles and once for the way back, but for one that is there still:
        # the last layer when it turns, the first when the next step begins.
        assert came[1] - came[0] == (2 * (2 * LAYERS - 1) - 1) * LAYER


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharded": True}, "offload is for one process, .*: leave out one of the two"),
        ({"bf16": True}, "with offload use --dtype bfloat16 instead"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    settings: dict[str, Any], message: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True, offload=True, **settings)
    with pytest.raises(UserError, match=message):
        NutePruneTrainer(tiny_model("llama"), args)
    assert list(tmp_path.iterdir()) == []


def test_packed_weights_are_refused(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.is_quantized = True  # as transformers marks them
    with pytest.raises(UserError, match="cannot be offloaded: leave out --bits or --offload"):
        make(model, tmp_path, offload=True)
