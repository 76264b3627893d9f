"""One layer at a time: what cutting holds, and what it leaves alone."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from nuteprune.errors import UserError
from nuteprune.gates.masks import Masks
from nuteprune.memory import mapped
from nuteprune.model.anatomy import Anatomy
from nuteprune.shrink.slicing import cut_part, cut_state
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.constraints import make_allocator


def half(anatomy: Anatomy, gates: str) -> Masks:
    """Masks that keep about half of what may go, each unit that stays halved."""
    args = NutePruneConfig(output_dir="unused", gates=gates, neuron_multiple=8, hidden_multiple=8)
    allocator = make_allocator(anatomy, args)
    scores = {k: torch.arange(1.0, len(v) + 1) for k, v in allocator.equal_scores().items()}
    masks = allocator.masks(allocator.shape(scores, 0.5 * allocator.maximum()), scores)
    return Masks(masks.layout, {k: v / 2 for k, v in masks.values.items()})


def test_a_layer_is_let_go_before_the_next_is_begun(tiny_model) -> None:
    anatomy = Anatomy(tiny_model("llama"))
    masks = half(anatomy, "neurons,hidden")
    held = [[weakref.ref(p) for p in layer.parameters()] for layer in anatomy.layers]
    parts = []
    for layer in (0, 1, 2, None):
        alive = [any(x() is not None for x in layer) for layer in held]
        assert alive == [i >= (len(held) if layer is None else layer) for i in range(len(held))]
        parts.append({k: x.clone() for k, x in cut_part(anatomy, masks, layer).items()})
    assert [len(x) for x in parts] == [9, 9, 9, 3]
    whole = cut_state(Anatomy(tiny_model("llama")), masks)
    assert sorted(whole) == sorted(name for part in parts for name in part)
    assert not list(anatomy.model.parameters())


def test_what_is_cut_is_not_written_to(tiny_model) -> None:
    """It may be a file, mapped into memory."""
    model = tiny_model("gemma2")
    values = {name: p.detach() for name, p in model.named_parameters()}
    before = {name: x.clone() for name, x in values.items()}
    anatomy = Anatomy(model)
    state = cut_state(anatomy, half(anatomy, "heads,neurons,hidden"))
    assert not torch.equal(state["model.norm.weight"], before["model.norm.weight"])
    assert all(torch.equal(values[name], x) for name, x in before.items())


def test_what_is_moved_to_a_file_is_the_same_and_leaves_none(tmp_path: Path) -> None:
    part = {"a": torch.randn(3, 5).T, "b": torch.randn(4).bfloat16()}
    found = mapped(part, tmp_path / "run")
    assert all(
        torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in part.items()
    )
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        mapped(part, tmp_path / "file")
