"""Weights that are away give what those that are there give, to the last bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nuteprune.model.anatomy import Anatomy
from nuteprune.model.weights import Away, Desk, bring_home, home_of, offload
from tests.families import MIXTURES, each, each_family

CPU = torch.device("cpu")
IDS_BT = torch.arange(3, 27).view(2, 12)


def logits_and_slopes(model: Any) -> list[Tensor]:
    """Return the logits (B, T, V), and the gradients by what the first layer reads."""
    embedded_BTD = model.get_input_embeddings()(IDS_BT).detach().requires_grad_(True)
    logits_BTV = model(inputs_embeds=embedded_BTD, use_cache=False).logits
    logits_BTV.square().sum().backward()
    assert embedded_BTD.grad is not None
    return [logits_BTV.detach(), embedded_BTD.grad]


def check(model: Any) -> None:
    before = dict(model.requires_grad_(False).named_parameters())
    expected = logits_and_slopes(model)
    offload(Anatomy(model), CPU)
    away = {name for name, x in model.named_parameters() if isinstance(x, Away)}
    assert all(map(torch.equal, logits_and_slopes(model), expected))
    bring_home(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    family = Anatomy(model).family
    staying = [f".{family.mixer_module}."] if family.mixer else []
    staying += [f".{family.experts.router}."] if family.experts else []
    for name, weight in before.items():
        matrix = name.startswith(f"{family.layers}.") and weight.dim() > 1
        assert (name in away) == (matrix and not any(x in name for x in staying)), name


@each_family
def test_a_model_gives_the_same(model_type: str, tiny_model: Callable[..., Any]) -> None:
    check(tiny_model(model_type))


@pytest.mark.parametrize("model_type", each(MIXTURES))
def test_a_mixture_gives_the_same(model_type: str, tiny_model: Callable[..., Any]) -> None:
    check(tiny_model(model_type))


@pytest.fixture
def away() -> tuple[Tensor, nn.Parameter]:
    """A weight, in the middle of a storage as in a file, and the same one away."""
    whole = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    home = whole[3:27]
    return home, nn.Parameter(Away(home, home, 0, Desk(CPU)), requires_grad=False)


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.t(),
    lambda x: x[4:9],
    lambda x: x[:, 2],
    lambda x: x.view(3, 8, 8)[1].t()[2:],
    lambda x: x.view(2, 12, 8).transpose(1, 2),
    lambda x: x.chunk(2, dim=-1)[1],
]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_away_too(view: Callable[[Tensor], Tensor], away: Any) -> None:
    home, weight = away
    seen, expected = view(weight), view(home)
    assert type(seen) is Away
    assert (seen.shape, seen.stride()) == (expected.shape, expected.stride())
    assert torch.equal(seen + 0, expected)


def test_nothing_is_written_to_a_copy(away: Any) -> None:
    with pytest.raises(RuntimeError, match="would write to a copy of a weight that is away"):
        away[1].zero_()


def test_the_layer_read_last_is_on_the_desk() -> None:
    desk = Desk(torch.device("meta"))
    first, second = torch.ones(2), torch.ones(3)
    copies = [desk.copy_of(first, 0), desk.copy_of(second, 0)]
    assert all(x.is_meta for x in copies)
    assert desk.copy_of(first, 0) is copies[0]
    seen = [weakref.ref(x) for x in copies]
    del copies
    assert all(x() is not None for x in seen)
    desk.copy_of(first, 1)
    assert all(x() is None for x in seen)


def test_what_is_put_in_a_folder_is_not_in_memory_any_more(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("llama").requires_grad_(False)
    twin = deepcopy(model)
    linear = model.model.layers[1].mlp.down_proj
    storage = weakref.ref(linear.weight.untyped_storage())
    offload(Anatomy(model), CPU, tmp_path)
    assert storage() is None
    assert list(tmp_path.iterdir()) == []  # files have no names
    assert torch.equal(home_of(linear.weight), twin.model.layers[1].mlp.down_proj.weight)
