"""What a process holds: freed memory that the C library keeps, and gives back when told to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from nuteprune import memory
from nuteprune.gates.masks import Layout, Masks
from nuteprune.model import layerwise
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.shrink import slicing

STATUS = Path("/proc/self/status")


def resident() -> int:
    (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="the system says what is resident")
def test_what_was_freed_is_given_back() -> None:
    size = 20_000  # bytes: small enough for the C library to take from its heap
    parts = [torch.ones(size // 4) for _ in range(4000)]
    held = resident()
    del parts[:-1]  # the last one is above them all
    memory.give_back()
    assert held - resident() > 0.9 * size * 4000


def test_it_is_given_back_after_each_layer(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(layerwise, "give_back", lambda: told.append("read"))
    monkeypatch.setattr(slicing, "give_back", lambda: told.append("cut"))
    anatomy = Anatomy(tiny_model("llama", num_hidden_layers=3))
    text = layerwise.Layerwise(anatomy, MaskHooks(anatomy), None, [torch.ones(1, 4).long()])
    assert told == ["read"]  # what came before it
    for layer in range(3):
        text.advance(layer)
    assert told == 4 * ["read"]
    slicing.cut_state(anatomy, Masks(Layout(anatomy.shape, anatomy.head_dim), {}))
    assert told[4:] == 4 * ["cut"]
