"""What units cost at a target, measured there, and scores that follow."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nuteprune.train.calibration import calibration_batches, refit_on, score_in_rounds, score_on
from nuteprune.train.pricing import MOST, Change, changes_of, following, logits_of

from nuteprune.gates.cutting import Predicted, mean_kl
from nuteprune.gates.importance import METHODS
from nuteprune.gates.masks import Masks
from nuteprune.gates.surgeon import INPUTS
from nuteprune.model.anatomy import Anatomy
from nuteprune.shrink.compensate import trying_out
from nuteprune.train import calibration, pricing
from nuteprune.train.prepare import prepare
from tests.refits import install_weight

from .test_rounds import TEXT, settings


def cut(ready: Any, target: float) -> tuple[Any, Masks]:
    scores = ready.allocator.chance_scores()
    return scores, ready.allocator.masks(ready.allocator.shape(scores, target), scores)


def test_changes_are_of_the_cheapest_that_stay_and_the_dearest_that_went(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pricing, "NEAR", 1e9)
    ready = prepare(tiny_model("llama"), settings(tmp_path))
    scores, masks = cut(ready, 0.5)
    found = changes_of(masks, scores, 4)
    for change in found:
        sizes = masks.layout.sizes[change.kind]
        mask = masks.values[change.kind].split(sizes)[change.layer]
        score = scores[change.kind].split(sizes)[change.layer]
        units = list(change.units)
        assert (mask[units] == (0 if change.back else 1)).all()
        if change.kind == "neurons":
            assert len(units) == 4
            others = [
                i for i in (mask == mask[units[0]]).nonzero().flatten().tolist() if i not in units
            ]
            ahead = (
                score[others] <= score[units].min()
                if change.back
                else score[others] >= score[units].max()
            )
            assert ahead.all()
        assert change.of(masks).values[change.kind].sum() == masks.values[change.kind].sum() + (
            len(units) if change.back else -len(units)
        )
    attention = {(x.layer, x.back) for x in found if x.kind == "kv_groups"}
    assert attention  # but of the first layer, and what would leave a layer none
    assert not [x for x in attention if x[0] == 0]
    kept = masks.values["kv_groups"].split(masks.layout.sizes["kv_groups"])
    assert {i for i, back in attention if not back} == {i for i in (1, 2) if kept[i].sum() > 1}


def test_attention_far_from_the_cut_is_not_measured(tiny_model: Any, tmp_path: Path) -> None:
    ready = prepare(tiny_model("llama"), settings(tmp_path))
    scores, masks = cut(ready, 0.5)
    scores["kv_groups"] = torch.tensor([1.0, 1.0, 0.4, 0.6, 1.9, 2.1])
    gone = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])  # so the cut is at 0.6

    def units(mask: torch.Tensor) -> set[tuple[int, tuple[int, ...], bool]]:
        changed = Masks(masks.layout, masks.values | {"kv_groups": mask})
        found = changes_of(changed, scores, 4)
        return {(x.layer, x.units, x.back) for x in found if x.kind == "kv_groups"}

    assert units(gone) == {(1, (0,), True), (1, (1,), True)}
    # Neurons are, wherever their layer stands: it is to move as a whole.
    scores["neurons"].split(masks.layout.sizes["neurons"])[2].mul_(1e6)
    sides = {(x.layer, x.back) for x in changes_of(masks, scores, 4) if x.kind == "neurons"}
    kept = [x.sum() for x in masks.values["neurons"].split(masks.layout.sizes["neurons"])]
    assert {i for i, back in sides if not back} == {i for i in range(3) if kept[i] > 4}
    gone[3] = 1.0  # at 0.4
    assert units(gone) == {(1, (0,), True)}
    gone[2] = 1.0  # nothing is gone: at the cheapest, 0.4
    assert units(gone) == {(1, (0,), False), (1, (1,), False)}


@pytest.mark.slow
def test_prices_are_those_of_a_model_that_is_cut_so(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other layers stay as they were re-fitted to the cut itself."""
    monkeypatch.setattr(pricing, "NEAR", 1e9)
    model, args = tiny_model("llama"), settings(tmp_path)
    dense = deepcopy(model)
    ready = prepare(model, args)
    plain = [p.clone() for p in ready.model.parameters()]
    scores, masks = cut(ready, 0.5)
    seen: dict[Change, float] = {}
    monkeypatch.setattr(
        calibration, "following", lambda scores, prices, _: seen.update(prices) or scores
    )
    monkeypatch.setattr(calibration, "score_on", lambda *_: scores)
    monkeypatch.setattr(calibration, "stops_before", lambda *_: [])
    monkeypatch.setitem(METHODS, "surgeon", replace(METHODS["surgeon"], settled=lambda _, x: x))
    bank, found = ready.coforward.bank, (TEXT, args, ready.anatomy, ready.hooks, ready.allocator)
    told: list[str] = []

    def progress(what: str, *_: int) -> None:
        told.append(what)

    score_in_rounds(*found, 0.5, partial(trying_out, bank), progress, dense=bank.as_dense)
    first = told.index("cutting more and less")
    assert told[first:] == ["cutting more and less"] * (1 + len(seen))  # nothing is timed with it
    assert all(map(torch.equal, plain, ready.model.parameters()))
    assert set(seen) == set(changes_of(masks, scores, 4))

    batches = calibration_batches(TEXT, args.priced_blocks, 4, first=True)
    assert torch.equal(batches[0][1], TEXT[1]["input_ids"])

    def refitted(to: Masks) -> Anatomy:
        anatomy = Anatomy(deepcopy(dense).requires_grad_(False))
        refit_on(TEXT, args, anatomy, calibration.MaskHooks(anatomy), to, install_weight(anatomy))
        return anatomy

    def loss(anatomy: Anatomy) -> float:
        whole = Anatomy(dense)
        with torch.no_grad():
            each = [
                mean_kl(Predicted.of(logits_of(whole, x)), logits_of(anatomy, x)) for x in batches
            ]
        return float(torch.stack(each).mean())

    own = refitted(masks)
    before = loss(own)
    for change in seen:
        other, end = refitted(change.of(masks)), own.ends(change.layer)[INPUTS[change.kind]]
        place, replaced = own.linear(change.layer, end), other.linear(change.layer, end)
        place.weight, replaced.weight = replaced.weight, place.weight
        assert seen[change] == pytest.approx(loss(own) - before, abs=2e-6), change
        place.weight, replaced.weight = replaced.weight, place.weight


def test_scores_follow_half_way(tiny_model: Any, tmp_path: Path) -> None:
    ready = prepare(tiny_model("llama"), settings(tmp_path))
    layout = ready.allocator.layout
    scores = {k: torch.ones(layout.units(k)) for k in ("kv_groups", "neurons")}
    prices = {
        Change("neurons", 0, (0, 1), back=False): 4.0,
        Change("neurons", 0, (2, 3), back=True): -4.0,
        Change("neurons", 1, (0, 1), back=False): 2.0,
        Change("neurons", 1, (2, 3), back=True): 0.0,
        Change("neurons", 2, (0, 1), back=False): -1.0,
        Change("kv_groups", 1, (0,), back=False): 1.0,
        Change("kv_groups", 1, (1,), back=True): -400.0,
    }
    found = following(scores, prices, layout)
    # Ratios are 2, 0.5, less than 0, 1 and 400; those above 0 have the median 1.5.
    usual = 1.5
    neurons = [x.unique().tolist() for x in found["neurons"].split(layout.sizes["neurons"])]
    assert neurons == [
        [pytest.approx((2 / usual) ** 0.5)],
        [pytest.approx((0.5 / usual) ** 0.5)],
        [pytest.approx(MOST**-0.5)],
    ]
    groups = found["kv_groups"].split(layout.sizes["kv_groups"])[1].tolist()
    assert groups == pytest.approx([(1 / usual) ** 0.5, MOST**0.5])
    assert all((x == 1).all() for x in scores.values())  # they stay as they were


@pytest.mark.slow
def test_scores_that_followed_lead_nearer_to_the_dense_model(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that counts, whose scores are said to be a hundredth, gets its neurons back."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= 20
    ready = prepare(model, settings(tmp_path, calibration_blocks=8))
    real = score_on

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        found["neurons"].split(ready.allocator.layout.sizes["neurons"])[1].div_(100)
        return found

    monkeypatch.setattr(calibration, "score_on", wrong)
    kept = []
    for priced in (False, True):
        monkeypatch.setattr(calibration, "priced", lambda *_, follow=priced: follow)
        given = TEXT, settings(tmp_path, calibration_blocks=8), ready.anatomy
        scores = score_in_rounds(
            *given, ready.hooks, ready.allocator, 0.3, partial(trying_out, ready.coforward.bank)
        )
        kept.append(ready.allocator.shape(scores, 0.3).layers[1].neurons)
    assert kept[1] > kept[0]
