"""What units cost at a target, measured there, and scores that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune.gates.copying_losses import Predicted, mean_kl
from nuteprune.gates.masks import Masks
from nuteprune.gates.surgeon import INPUTS
from nuteprune.shrink.least_squares import fit_projections
from nuteprune.stages import price as stage
from nuteprune.stages.choose import choose
from nuteprune.stages.price import MOST, Change, changes_of, following, logits_of, price
from nuteprune.stages.score import score
from nuteprune.train.prepare import prepare
from tests.refits import install_weight

from .conftest import TEXT, plain, settings


def cut(ready: Any, target: float) -> tuple[Any, Masks]:
    scores = ready.allocator.chance_scores()
    return scores, choose(ready, scores, target)


def test_changes_are_of_the_cheapest_that_stay_and_the_dearest_that_went(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "NEAR", 1e9)
    ready = plain(tiny_model("llama"), tmp_path)
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
    ready = plain(tiny_model("llama"), tmp_path)
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
    """The other layers stay as they were refitted to the cut itself."""
    monkeypatch.setattr(stage, "NEAR", 1e9)
    ready = prepare(tiny_model("llama"), settings(tmp_path))
    scores, masks = cut(ready, 0.5)
    seen: dict[Change, float] = {}
    monkeypatch.setattr(stage, "following", lambda scores, prices, _: seen.update(prices) or scores)
    told: list[str] = []
    batches, refitted_on = TEXT[20:22].split(4), TEXT[:18]
    price(ready, scores, 0.5, TEXT[20:22], refitted_on, progress=lambda what, *_: told.append(what))
    first = told.index("price")
    assert told[first:] == ["price"] * (1 + len(seen))  # nothing is timed with it
    assert set(seen) == set(changes_of(masks, scores, 4))

    def refitted(to: Masks) -> Any:
        model = plain(tiny_model("llama"), tmp_path)
        install = install_weight(model.anatomy)
        fit_projections(model.anatomy, model.hooks, to, refitted_on.split(4), install)
        return model

    dense = plain(tiny_model("llama"), tmp_path)

    @torch.no_grad()
    def loss(model: Any) -> float:
        each = [mean_kl(Predicted.of(logits_of(dense, x)), logits_of(model, x)) for x in batches]
        return float(torch.stack(each).mean())

    own = refitted(masks)
    before = loss(own)
    for change in seen:
        other = refitted(change.of(masks)).anatomy
        end = other.ends(change.layer)[INPUTS[change.kind]]
        place, replaced = own.anatomy.linear(change.layer, end), other.linear(change.layer, end)
        place.weight, replaced.weight = replaced.weight, place.weight
        assert seen[change] == pytest.approx(loss(own) - before, abs=2e-6), change
        place.weight, replaced.weight = replaced.weight, place.weight


def test_scores_follow_half_way(tiny_model: Any, tmp_path: Path) -> None:
    layout = plain(tiny_model("llama"), tmp_path).layout
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
    tiny_model: Any, tmp_path: Path
) -> None:
    """A layer that counts, whose scores are said to be a hundredth, gets its neurons back."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= 20
    ready = prepare(model, settings(tmp_path))
    wrong = score(ready, TEXT[:8])
    wrong["neurons"].split(ready.layout.sizes["neurons"])[1].div_(100)
    followed = price(ready, wrong, 0.3, TEXT[36:], TEXT[:36])
    kept = [ready.allocator.shape(x, 0.3).layers[1].neurons for x in (wrong, followed)]
    assert kept[1] > kept[0]
