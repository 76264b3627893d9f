"""Base weights in 8 or 4 bits: trained around, and never what is written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune import UserError, load_pruned
from nuteprune.jobs.sources import load_model
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.weights import weight_of

from .conftest import make

ERRORS = {8: 0.02, 4: 0.15}
"""Bits -> the most that unpacked weights may differ from the whole ones, relative in norm."""


@pytest.fixture
def stored(tiny_model, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    # Multiples of 64 inputs in each projection.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
    tiny_model("llama", **sizes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_are_counted_and_read_like_whole_ones(bits: int, stored: Path) -> None:
    whole = Anatomy(load_model(str(stored), torch.float32))
    packed = Anatomy(load_model(str(stored), torch.float32, bits))
    assert (
        packed.parameters() == whole.parameters() == sum(map(torch.numel, whole.model.parameters()))
    )
    assert packed.shape == whole.shape
    for i in range(len(whole.layers)):
        for projection in whole.family.projections:
            linear = packed.linear(i, projection)
            assert linear is not None
            assert linear.weight.dtype in (torch.int8, torch.uint8)
            expected = whole.linear(i, projection).weight  # type: ignore[union-attr]
            error = (weight_of(linear).float() - expected).norm() / expected.norm()
            assert 0 < error < ERRORS[bits]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "settings"),
    [(8, {}), (4, {}), (4, {"gate_type": "hard_concrete"}), (8, {"method": "wanda"})],
    ids=str,
)
def test_what_is_cut_is_the_whole_model(
    bits: int, settings: dict[str, Any], stored: Path, tmp_path: Path
) -> None:
    whole = load_model(str(stored), torch.float32)
    trainer = make(
        load_model(str(stored), torch.float32, bits), tmp_path / "run", max_steps=2, **settings
    )
    trainer.train()
    with pytest.raises(UserError, match=r"cannot be cut: load the model again, whole"):
        trainer.finalize()
    lora = {name: x.detach().clone() for name, x in trainer.prepared.bank.state().items()}
    masks = trainer.final_masks()
    assert masks is not None
    small = trainer.finalize(copy.deepcopy(whole))
    record = trainer.save_pruned(tmp_path / "out")
    assert 0.3 <= record["sparsity"] < 0.32
    assert record["params"]["before"] == sum(map(torch.numel, whole.parameters()))
    kept = masks.part("neurons", 0) > 0  # type: ignore[operator]
    at = [p.path for p in trainer.anatomy.family.projections].index("mlp.gate_proj")
    merged = whole.model.layers[0].mlp.gate_proj.weight + lora[f"0.{at}.B"] @ lora[f"0.{at}.A"]
    assert torch.allclose(small.model.layers[0].mlp.gate_proj.weight, merged[kept], atol=1e-6)
    assert load_pruned(tmp_path / "out").dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "multiple"), [(8, 4), (4, 64)])
def test_a_pruned_model_in_bits_is_pruned_again(
    bits: int, multiple: int, stored: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_steps": 0, "gates": "neurons", "neuron_multiple": multiple}
    trainer = make(load_model(str(stored), torch.float32), tmp_path / "run", **settings)
    trainer.finalize()
    trainer.save_pruned(tmp_path / "once")
    again = load_model(str(tmp_path / "once"), torch.float32, bits)
    trainer = make(again, tmp_path / "run2")
    trainer.train()
    trainer.finalize(load_model(str(tmp_path / "once"), torch.float32))
    assert trainer.save_pruned(tmp_path / "twice")["sparsity"] >= 0.3


def test_rows_that_a_cpu_unpacks_wrongly_are_refused(tiny_model, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"q_proj has 32 inputs, .* multiples of 64; use 8 bits"):
        make(load_model(str(tmp_path / "model"), torch.float32, 4), tmp_path / "run")
