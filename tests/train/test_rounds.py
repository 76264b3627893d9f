"""Scoring in rounds: what is left at a stop is scored as the smaller model that it is."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from nuteprune.train.calibration import refit_on, refits, score_in_rounds, score_on, stops_before

from nuteprune import NutePruneConfig
from nuteprune.data.blocks import BlockDataset
from nuteprune.export.checkpoint import assemble
from nuteprune.gates import removal
from nuteprune.gates.importance import METHODS
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.shrink.compensate import trying_out
from nuteprune.train import calibration
from nuteprune.train.prepare import prepare
from nuteprune.train.setup import make_allocator
from tests.refits import install_weight

TEXT = BlockDataset(torch.randint(3, 96, (40, 16), generator=torch.Generator().manual_seed(0)))
KINDS = ("kv_groups", "neurons")


def settings(folder: Path, **more: Any) -> NutePruneConfig:
    common = {"use_cpu": True, "calibration_blocks": 4, "neuron_multiple": 4, "max_steps": 2}
    return NutePruneConfig(output_dir=str(folder), **{**common, **more})


@pytest.mark.parametrize(
    ("target", "more", "stops"),
    [
        (0.3, {}, []),
        (0.5, {}, [0.25]),
        (0.6, {}, [0.3]),
        (0.75, {"method": "taylor"}, [0.25, 0.5]),
        (0.5, {"method": "random"}, []),
        (0.5, {"ramp_share": 0.5}, []),
        (0.5, {"compensation": False}, []),
        (0.5, {"sharded": True}, []),
    ],
)
def test_stops_on_the_way(target: float, more: Any, stops: list[float], tmp_path: Path) -> None:
    args = settings(tmp_path, **more)
    assert stops_before(target, args, KINDS) == pytest.approx(stops)
    assert stops_before(target, args, (*KINDS, "hidden")) == []
    assert stops_before(target, args, KINDS, packed=True) == []


@pytest.mark.parametrize(
    ("targets", "more", "times", "priced"),
    [
        ((0.2,), {}, 2, 2),
        ((0.5,), {}, 3, 2),
        ((0.2, 0.5), {}, 4, 2),
        ((0.2,), {"method": "flap"}, 1, 0),
        ((0.5,), {"method": "flap"}, 2, 0),
        ((0.2,), {"ramp_share": 0.5}, 1, 0),
        ((0.2,), {"sharded": True}, 1, 0),
        ((0.2,), {"compensation": False}, 0, 0),
    ],
)
def test_re_fits_and_blocks_of_prices(
    targets: tuple[float, ...], more: Any, times: int, priced: int, tmp_path: Path
) -> None:
    """At each stop, where prices are measured, and at each target; half a block for each of 4."""
    args = settings(tmp_path, **more)
    assert refits(targets, args, KINDS) == times
    assert args.priced_blocks == priced
    assert args.calibrated_blocks == max(args.scored_blocks, args.refit_blocks + priced)
    kept = len(targets) * bool(args.compensation)
    assert refits(targets, args, (*KINDS, "hidden")) == kept
    assert refits(targets, args, KINDS, packed=True) == kept


@pytest.mark.parametrize("method", ["surgeon", "fisher"])
def test_what_is_left_is_scored_as_the_smaller_model(
    method: str, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against scores of a model that is cut in fact."""
    monkeypatch.setattr(removal, "ROUNDS", 1000)  # one unit at a time, in both
    monkeypatch.setattr(calibration, "priced", lambda *_: False)
    model, args = tiny_model("llama"), settings(tmp_path, method=method)
    dense = deepcopy(model)
    ready = prepare(model, args)
    plain = [p.clone() for p in ready.model.parameters()]
    scores = score_in_rounds(
        TEXT,
        args,
        ready.anatomy,
        ready.hooks,
        ready.allocator,
        0.5,
        lambda: trying_out(ready.coforward.bank),
    )
    assert all(map(torch.equal, plain, ready.model.parameters()))

    anatomy = Anatomy(dense.requires_grad_(False))
    hooks, allocator = MaskHooks(anatomy), make_allocator(anatomy, args)
    first = score_on(TEXT, args, anatomy, hooks, allocator)
    masks = allocator.masks(allocator.shape(first, 0.25), first)
    refit_on(TEXT, args, anatomy, hooks, masks, install_weight(anatomy))
    small, _ = assemble(anatomy, masks)
    left = Anatomy(small.requires_grad_(False))
    again = score_on(TEXT, args, left, MaskHooks(left), make_allocator(left, args))
    together = {}
    for kind in KINDS:
        kept = masks.values[kind] > 0
        assert int((~kept).sum()) > 0 or kind == "kv_groups"
        together[kind] = first[kind].clone().masked_scatter_(kept, again[kind])
    expected = METHODS[method].settled(ready.allocator.layout, together)
    for kind in KINDS:
        torch.testing.assert_close(scores[kind], expected[kind], rtol=2e-3, atol=1e-9)
