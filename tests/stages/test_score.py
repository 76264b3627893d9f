"""Scoring in rounds: what is left at a stop is scored as the smaller model that it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from nuteprune.export.checkpoint import assemble
from nuteprune.gates import surgeon_costs
from nuteprune.gates.importance import METHODS
from nuteprune.shrink.least_squares import fit_projections
from nuteprune.stages.choose import choose
from nuteprune.stages.refit import refit
from nuteprune.stages.score import score, stops_before, with_gradients
from nuteprune.train.prepare import prepare
from tests.refits import install_weight

from .conftest import KINDS, TEXT, cut_of, plain, settings


@pytest.mark.parametrize(
    ("target", "stops"), [(0.3, []), (0.5, [0.25]), (0.6, [0.3]), (0.75, [0.25, 0.5])]
)
def test_stops_on_the_way(target: float, stops: list[float]) -> None:
    assert stops_before(target) == pytest.approx(stops)


@pytest.mark.parametrize(
    ("method", "blocks", "count"),
    [("surgeon", 24, 24), ("surgeon", 96, 32), ("surgeon", 192, 64), ("taylor", 8, 8)],
)
def test_gradients_are_taken_on_a_third_but_not_on_a_few(
    method: str, blocks: int, count: int
) -> None:
    assert with_gradients(method, blocks) == count


@pytest.mark.parametrize(("gradients", "count"), [(None, 6), (2, 2)])
def test_so_many_blocks_have_gradients(
    gradients: int | None, count: int, tiny_model: Any, tmp_path: Path
) -> None:
    asked: list[Any] = []
    watched = replace(
        METHODS["surgeon"], score=lambda x: asked.append(x) or METHODS["fisher"].score(x)
    )
    prepared = prepare(tiny_model("llama"), settings(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "surgeon", watched)
        score(prepared, TEXT[:6], gradients=gradients)
    [probe] = asked
    assert sum(map(len, probe.batches)) == count
    assert sum(map(len, probe.plain_batches)) == 6


@pytest.mark.parametrize(
    ("more", "rounds"),
    [
        ({}, True),
        ({"method": "flap"}, True),
        ({"method": "random"}, False),  # it reads nothing
        ({"ramp_share": 0.5}, False),
        ({"refit": False}, False),
        ({"sharded": True}, True),
        ({"gates": "neurons,hidden", "hidden_multiple": 8, "method": "fisher"}, False),
    ],
    ids=str,
)
def test_rounds_are_where_cuts_can_be_tried(
    more: dict[str, Any], rounds: bool, tiny_model: Any, tmp_path: Path, monkeypatch
) -> None:
    cut = cut_of(tiny_model("llama"), tmp_path, target_sparsity=0.5, **more)
    asked: list[Any] = []
    monkeypatch.setattr(
        "nuteprune.train.first_stages.score",
        lambda *_, **how: asked.append(how["refit_blocks"]) or {},
    )
    cut.score()
    assert [x is not None for x in asked] == [rounds]


@pytest.mark.parametrize("target", [0.0, 0.2])
def test_scores_know_what_is_to_go(target: float, tiny_model: Any, tmp_path: Path) -> None:
    asked: list[Any] = []
    watched = replace(
        METHODS["surgeon"], score=lambda x: asked.append(x.cut_by) or METHODS["fisher"].score(x)
    )
    prepared = prepare(tiny_model("llama"), settings(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "surgeon", watched)
        found = score(prepared, TEXT[:6], target=target)
    [cut_by] = asked
    assert (cut_by is None) == (not target)
    if target:
        assert any(bool((x == 0).any()) for x in cut_by(found).values())


def test_lora_that_adds_nothing_is_not_computed(tiny_model: Any, tmp_path: Path) -> None:
    prepared, computed = prepare(tiny_model("llama"), settings(tmp_path)), []
    for module in prepared.anatomy.model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A["default"].register_forward_hook(lambda *_: computed.append(1))
    scores = score(prepared, TEXT[:4], target=0.5, refit_blocks=TEXT[:8])
    refit(prepared, choose(prepared, scores, 0.5), TEXT[:8])
    assert not computed
    prepared.anatomy.model(TEXT[:1])
    assert computed


@pytest.mark.parametrize("method", ["surgeon", "fisher"])
def test_what_is_left_is_scored_as_the_smaller_model(
    method: str, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against scores of a model that is cut in fact."""
    monkeypatch.setattr(surgeon_costs, "ROUNDS", 1000)  # one unit at a time, in both
    blocks, refit_blocks = TEXT[:4], TEXT[:18]
    prepared = prepare(tiny_model("llama"), settings(tmp_path))
    found = score(prepared, blocks, method=method, target=0.5, refit_blocks=refit_blocks)

    dense = plain(tiny_model("llama"), tmp_path)
    first = score(dense, blocks, method=method)
    masks = choose(dense, first, 0.25)
    anatomy = dense.anatomy
    install = install_weight(anatomy)
    fit_projections(anatomy, dense.hooks, masks, refit_blocks.split(4), install)
    dense.hooks.remove()
    left = plain(assemble(anatomy, masks)[0], tmp_path)
    again = score(left, blocks, method=method)
    together = {}
    for kind in KINDS:
        kept = masks.values[kind] > 0
        assert int((~kept).sum()) > 0 or kind == "kv_groups"
        together[kind] = first[kind].clone().masked_scatter_(kept, again[kind])
    for kind in KINDS:
        torch.testing.assert_close(found[kind], together[kind], rtol=2e-3, atol=1e-9)
