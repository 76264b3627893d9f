from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nuteprune.gates.allocate import Allocator
from nuteprune.gates.allowed_shapes import Constraints
from nuteprune.gates.budget import Budget
from nuteprune.gates.masks import Masks
from nuteprune.model.families import FAMILIES
from nuteprune.model.shape import LayerShape, Shape
from nuteprune.progressive import gates as hard_concrete
from nuteprune.progressive.gates import Gates, HardConcreteGates, RankedGates

LAYERS, GROUPS, NEURONS, WIDTH = 3, 4, 48, 32
KINDS = ("kv_groups", "neurons", "hidden")
BEFORE = WIDTH * LAYERS * (GROUPS * 4 * 6 + 3 * NEURONS)
STEP = 3 * 4 * WIDTH / BEFORE  # the smallest one: four neurons of one layer


def allocator(kinds: tuple[str, ...] = KINDS) -> Allocator:
    family = FAMILIES["llama"]
    shape = Shape(WIDTH, (LayerShape(2 * GROUPS, GROUPS, NEURONS),) * LAYERS)
    budget = Budget(family, shape, 4, {p.path: False for p in family.projections})
    return Allocator(budget, Constraints(kinds, neuron_multiple=4, hidden_multiple=4))


def scores_of(x: Allocator, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {k: torch.rand(x.layout.units(k), generator=random) for k in x.constraints.kinds}


def check_exportable(values: dict[str, Tensor], sparsity: float) -> None:
    """Counts are exportable and, recounted by hand, remove what was asked or one step more."""
    hidden = int((values["hidden"] > 0).sum())
    groups = (values["kv_groups"] > 0).view(LAYERS, GROUPS).sum(1)
    neurons = (values["neurons"] > 0).view(LAYERS, NEURONS).sum(1)
    assert hidden % 4 == 0
    assert (neurons % 4 == 0).all()
    assert (groups > 0).all()
    assert (neurons > 0).all()
    # per group two query heads, key and value of four features, and the output for the queries
    after = hidden * (int(groups.sum()) * 4 * (2 + 1 + 1 + 2) + 3 * int(neurons.sum()))
    removed = 1 - after / BEFORE
    assert sparsity - 1e-9 <= removed <= sparsity + STEP


def observe(gates: RankedGates, gradients: dict[str, Tensor]) -> None:
    """Play a micro-batch whose backward pass gives the masks these gradients (B, N)."""
    batch = len(next(iter(gradients.values())))
    values = gates.masks(batch).values
    sum((values[kind] * gradient).sum() for kind, gradient in gradients.items()).backward()
    gates.observe()


def random_gradients(x: Allocator, batch: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {k: torch.randn(batch, x.layout.units(k), generator=random) for k in KINDS}


# -- ranked gates


def test_ranked_masks_are_exportable_at_the_scheduled_sparsity_at_each_step() -> None:
    x = allocator()
    gates = RankedGates(x, scores_of(x), decay=0.95)
    for step, sparsity in enumerate((0.0, 0.05, 0.1, 0.3, 0.5)):
        gates.begin_step(sparsity, seed=step)
        values = gates.masks(3).values
        assert all(set(v.unique().tolist()) <= {0.0, 1.0} for v in values.values())
        for row in range(3):
            check_exportable({k: v[row] for k, v in values.items()}, sparsity)
        check_exportable(gates.snapshot().values, sparsity)
        assert sparsity - 1e-9 <= gates.sparsity() <= sparsity + STEP
        observe(gates, random_gradients(x, 3, step))
        gates.end_step()


def test_scores_are_a_moving_average_of_squared_gradients_per_sequence() -> None:
    x = allocator()
    old = scores_of(x)
    gates = RankedGates(x, old, decay=0.8)
    gates.begin_step(0.2, seed=0)
    batches = [random_gradients(x, 2, 1), random_gradients(x, 3, 2)]  # of one optimizer step
    for gradients in batches:
        observe(gates, gradients)
    gates.end_step()

    rows = [
        {k: g[b] for k, g in batch.items()}
        for batch in batches
        for b in range(len(batch["hidden"]))
    ]
    seen = {k: sum(row[k] ** 2 for row in rows) for k in KINDS}
    have_all, seen_all = (float(sum(v.sum() for v in d.values())) for d in (old, seen))
    for kind in KINDS:
        expected = 0.8 * old[kind] + 0.2 * seen[kind] * have_all / seen_all
        torch.testing.assert_close(gates.scores[kind], expected)
    # What one step has seen does not count in the next.
    before = {k: v.clone() for k, v in gates.scores.items()}
    gates.end_step()
    torch.testing.assert_close(gates.scores, before, rtol=0, atol=0)


def test_scores_follow_the_sequences_of_all_ranks(monkeypatch) -> None:
    x = allocator()
    alone, rank = RankedGates(x, scores_of(x), decay=0.95), RankedGates(x, scores_of(x), decay=0.95)
    mine, other = random_gradients(x, 2, 1), random_gradients(x, 2, 2)
    for gates, batches in ((alone, (mine, other)), (rank, (mine,))):
        gates.begin_step(0.2, seed=0)
        for gradients in batches:
            observe(gates, gradients)
    alone.end_step()
    sent = [other[kind].square().sum(0) for kind in KINDS]
    answers = {"is_initialized": True, "get_rank": 0, "get_world_size": 2, "get_backend": "gloo"}
    for name, answer in answers.items():
        monkeypatch.setattr(f"torch.distributed.{name}", lambda answer=answer: answer)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda seen: seen.add_(sent.pop(0)))
    rank.end_step()
    torch.testing.assert_close(rank.scores, alone.scores)


def test_removed_units_can_return() -> None:
    x = allocator(("neurons",))
    gates = RankedGates(x, scores_of(x), decay=0.5)
    gates.begin_step(0.3, seed=0)
    removed = (gates.snapshot().values["neurons"] == 0).nonzero().flatten()
    lucky = removed[:4]
    gradient = torch.full((1, LAYERS * NEURONS), 0.1)
    gradient[0, lucky] = 5.0
    observe(gates, {"neurons": gradient})
    gates.end_step()
    gates.begin_step(0.3, seed=1)
    again = gates.snapshot().values["neurons"]
    assert (again[lucky] == 1).all()
    assert (again == 0).sum() == len(removed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_step_that_is_not_finite_leaves_scores_as_they_were(bad: float) -> None:
    x = allocator()
    gates = RankedGates(x, scores_of(x), decay=0.95)
    gates.begin_step(0.2, seed=0)
    gradients = random_gradients(x, 2, 0)
    gradients["neurons"][0, 0] = bad  # the square of 1e30 is beyond fp32
    observe(gates, gradients)
    gates.end_step()
    torch.testing.assert_close(gates.scores, scores_of(x), rtol=0, atol=0)


# -- hard-concrete gates


def hard() -> HardConcreteGates:
    """Return gates in the middle of their training: log-alpha spread in the order of scores."""
    x = allocator()
    gates = HardConcreteGates(x, scores_of(x))
    for kind, scores in scores_of(x).items():
        ranks = scores.argsort().argsort().float() / max(1, len(scores) - 1)
        gates.log_alpha[kind].data = -3 + 7 * ranks
    return gates


def test_expected_sparsity_is_the_mean_over_draws() -> None:
    gates, kept = hard(), []
    for seed in range(200):
        gates.begin_step(0.3, seed)
        drawn = {k: (v > 0).double() for k, v in gates.masks(1).values.items()}
        blocks = drawn["kv_groups"].sum() * 4 * 6 + 3 * drawn["neurons"].sum()
        kept.append(float(drawn["hidden"].sum() * blocks))
    # Recounted by hand, up to the draws' own spread.
    assert 1 - sum(kept) / len(kept) / BEFORE == pytest.approx(gates.sparsity(), abs=0.02)


def test_noise_depends_on_the_seed_alone() -> None:
    drawn = []
    for gates, seed in ((hard(), 5), (hard(), 5), (hard(), 6)):
        gates.begin_step(0.4, seed)
        first, second = gates.masks(2).values, gates.masks(4).values
        torch.rand(3)  # the global generator plays no part
        assert all(torch.equal(first[k], second[k]) for k in KINDS)  # one draw for all of a step
        drawn.append(first)
    assert all(torch.equal(drawn[0][k], drawn[1][k]) for k in KINDS)
    assert not torch.equal(drawn[0]["neurons"], drawn[2]["neurons"])
    assert drawn[0]["neurons"].requires_grad


def test_log_alpha_stays_within_its_limits() -> None:
    gates = hard()
    gates.log_alpha["neurons"].data[:2] = torch.tensor([50.0, -50.0])
    gates.begin_step(0.2, seed=0)
    limits = torch.tensor([100.0, 0.01]).log()
    torch.testing.assert_close(gates.log_alpha["neurons"].data[:2], limits)


def test_gates_start_open_as_published() -> None:
    x = allocator()
    gates = HardConcreteGates(x, scores_of(x))
    for kind in KINDS:
        assert (hard_concrete.keep_probability(gates.log_alpha[kind]) > 0.95).all()
    assert gates.log_alpha["neurons"].data.sigmoid() == pytest.approx(0.99)
    assert gates.log_alpha["kv_groups"].data.exp() == pytest.approx(100)


def test_a_snapshot_drops_as_many_as_are_expected_to_be_gone() -> None:
    gates = hard()
    gates.begin_step(0.5, seed=0)
    values = gates.snapshot().values
    for kind, all_values in values.items():
        keeps = hard_concrete.keep_probability(gates.log_alpha[kind]).detach()
        sizes, lost = gates.allocator.layout.sizes[kind], 0
        for value, keep in zip(all_values.split(sizes), keeps.split(sizes), strict=True):
            gone = round(float((1 - keep).sum()))
            lost += gone
            assert int((value == 0).sum()) == gone
            if 0 < gone < len(value):
                assert keep[value == 0].max() <= keep[value > 0].min()
        assert lost > 0
    torch.testing.assert_close(values, gates.snapshot().values, rtol=0, atol=0)


def test_frozen_hard_concrete_masks_are_exportable_and_keep_soft_values() -> None:
    gates = hard()
    gates.begin_step(0.4, seed=0)
    values = gates.freeze(0.4).values
    check_exportable(values, 0.4)
    expected = {k: hard_concrete.test_value(v) for k, v in gates.log_alpha.items()}
    for kind, value in values.items():
        kept = value > 0
        assert not value.requires_grad
        torch.testing.assert_close(value[kept], expected[kind][kept].detach())
        assert value[kept].std() > 0
        assert value[kept].max() < 1
    rows = zip(
        values["neurons"].view(LAYERS, -1), expected["neurons"].view(LAYERS, -1), strict=True
    )
    for value, soft in rows:  # the likeliest of each layer stay
        kept = (value > 0)[soft.argsort(descending=True)].int()
        assert torch.equal(kept, kept.sort(descending=True).values)
    assert gates.penalty() is None


def train_gates(gates: HardConcreteGates, maximize: bool, target: float) -> float:
    """Let gates that are free of any other wish follow the sparsity term; return where they end."""
    groups = gates.parameter_groups()
    assert [group.get("maximize", False) for group in groups] == [False, True]
    groups[1]["maximize"] = maximize
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(250):
        asked = target * min(1.0, (step + 1) / 150)
        gates.begin_step(asked, seed=step)
        penalty = gates.penalty()
        assert penalty is not None
        penalty.backward()
        optimizer.step()
        optimizer.zero_grad()
    return gates.sparsity()


@pytest.mark.slow
def test_the_lagrangian_drives_sparsity_to_the_target_by_ascent() -> None:
    assert train_gates(hard(), maximize=True, target=0.4) == pytest.approx(0.4, abs=0.03)
    assert abs(train_gates(hard(), maximize=False, target=0.4) - 0.4) > 0.1


def test_a_likely_group_does_not_go_in_place_of_neurons_that_are_all_but_gone() -> None:
    """A group is worth 12 neurons in parameters: probabilities alone would sum up wrongly."""
    x = allocator(("kv_groups", "neurons"))
    gates = HardConcreteGates(x, scores_of(x))
    gates.log_alpha["kv_groups"].data.fill_(4.0)
    gates.log_alpha["neurons"].data.fill_(3.0)
    gates.log_alpha["neurons"].data.view(LAYERS, -1)[:, :16] = -3.0
    final = gates.freeze(0.15).values
    assert (final["kv_groups"] > 0).all()
    assert (final["neurons"].view(LAYERS, -1)[:, 16:] > 0).all()


# -- all


def ranked() -> RankedGates:
    x = allocator()
    return RankedGates(x, scores_of(x), decay=0.95)


@pytest.mark.parametrize("make", [ranked, hard])
def test_frozen_masks_stay_whatever_comes(make) -> None:
    gates: Gates = make()
    gates.begin_step(0.3, seed=0)
    final = {k: v.clone() for k, v in gates.freeze(0.3).values.items()}
    check_exportable(final, 0.3)
    assert 0.3 <= gates.sparsity() <= 0.3 + STEP
    gates.begin_step(0.5, seed=1)
    masks = gates.masks(2)
    gates.observe()
    gates.end_step()
    for now in (masks, gates.snapshot()):
        torch.testing.assert_close(now.values, final, rtol=0, atol=0)


@pytest.mark.parametrize("make", [ranked, hard])
def test_gates_resume_where_they_were(make) -> None:
    gates, fresh = make(), make()
    for step in range(3):
        gates.begin_step(0.1 * step, seed=step)
        if isinstance(gates, RankedGates):
            observe(gates, random_gradients(gates.allocator, 2, step))
        else:
            gates.log_alpha["neurons"].data += 0.1 * torch.rand(LAYERS * NEURONS)
        gates.end_step()
    fresh.load_state_dict(gates.state_dict())
    for each in (gates, fresh):
        each.begin_step(0.35, seed=3)
    assert fresh.sparsity() == gates.sparsity()
    for ours, theirs in ((fresh.masks(2), gates.masks(2)), (fresh.snapshot(), gates.snapshot())):
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=0)

    frozen, again = gates.freeze(0.35), make()
    again.load_state_dict(gates.state_dict())
    again.restore_masks(Masks(frozen.layout, frozen.values))
    assert again.frozen
    assert again.sparsity() == pytest.approx(gates.sparsity(), abs=1e-6)
    torch.testing.assert_close(again.masks(1).values, frozen.values, rtol=0, atol=0)
