"""The allocator against an enumeration of all shapes, and of all units to remove."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nuteprune.errors import UserError
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.allowed_shapes import Constraints
from nuteprune.gates.budget import Budget
from nuteprune.gates.costs import Cost, Goal, Uncounted
from nuteprune.gates.masks import Layout
from nuteprune.model.families import FAMILIES
from nuteprune.model.shape import LayerShape, Shape
from tests.families import DENSE_KINDS

MULTI_HEAD, GROUPED = LayerShape(4, 4, 24), LayerShape(6, 2, 24)


@dataclass(frozen=True)
class Case:
    """A tiny budget, and all that can become of it."""

    layers: tuple[LayerShape, ...]
    kinds: tuple[str, ...]
    uniform: bool = False
    model_type: str = "llama"

    @cached_property
    def budget(self) -> Budget:
        family = FAMILIES[self.model_type]
        biased = self.model_type in ("opt", "gpt_neox")
        biases = {p.path: biased for p in family.projections}
        return Budget(family, Shape(16, self.layers), 4, biases)

    @cached_property
    def allocator(self) -> Allocator:
        further = ("kv_groups", "neurons", "hidden", "attn_block", "mlp_block")
        refusal = FAMILIES[self.model_type].refusal
        new = (x for x in further if x not in self.kinds)
        others = tuple(x for x in new if not refusal(x, self.uniform))
        return Allocator(self.budget, Constraints(self.kinds, self.uniform, 8, 4, others=others))

    @cached_property
    def shapes(self) -> dict[Shape, int]:
        """All exportable shapes, and the parameters of each."""
        layers = [self.layer_shapes(i) for i in range(len(self.layers))]
        widths = range(4, 17, 4) if "hidden" in self.kinds else [16]
        found = [
            Shape(w, combination) for combination in itertools.product(*layers) for w in widths
        ]
        if self.uniform:
            heads_divide = self.budget.family.heads_divide_hidden
            found = [x for x in found if x.uniform]
            found = [x for x in found if not heads_divide or x.hidden % x.layers[0].heads == 0]
        return {shape: self.budget.parameters(shape) for shape in found}

    def layer_shapes(self, i: int) -> list[LayerShape]:
        old, kinds = self.layers[i], self.kinds
        inner = old.heads_per_group
        attention = [
            (groups * heads, groups)
            for groups in range(1, old.kv_heads + 1)
            for heads in range(1, inner + 1)
            if groups == old.kv_heads or "kv_groups" in kinds or ("heads" in kinds and inner == 1)
            if heads == inner or "heads" in kinds
        ]
        if "attn_block" in kinds and i > 0:
            attention.append((0, 0))
        fewer = range(8, old.neurons, 8) if "neurons" in kinds else ()
        neurons = [*fewer, old.neurons]
        if "mlp_block" in kinds:
            neurons.append(0)
        return [LayerShape(*a, n) for a, n in itertools.product(attention, neurons)]

    def split(self, scores: dict[str, Tensor]) -> dict[str, list[list[float]]]:
        sizes = Layout(self.budget.shape, 4).sizes
        return {k: [part.tolist() for part in v.split(sizes[k])] for k, v in scores.items()}

    def loss(self, shape: Shape, parts: dict[str, list[list[float]]]) -> float:
        """The least loss of all ways to cut to a shape."""
        total = least(parts["hidden"][0], 16 - shape.hidden) if "hidden" in parts else 0.0
        for i, (old, new) in enumerate(zip(self.layers, shape.layers, strict=True)):
            if not new.mlp:
                total += parts["mlp_block"][i][0]
            elif "neurons" in parts:
                total += least(parts["neurons"][i], old.neurons - new.neurons)
            if not new.attention:
                total += parts["attn_block"][i][0]
            else:
                total += attention_loss(old, new, {k: v[i] for k, v in parts.items() if i < len(v)})
        return total


def least(scores: list[float], removed: int) -> float:
    return sum(sorted(scores)[:removed])


def attention_loss(old: LayerShape, new: LayerShape, parts: dict[str, list[float]]) -> float:
    """Try each choice of KV heads; each that stays loses its cheapest query heads."""
    inner, best = old.heads_per_group, math.inf
    heads = parts.get("heads", [0.0] * old.heads)
    groups = [heads[j * inner : (j + 1) * inner] for j in range(old.kv_heads)]
    for kept in itertools.combinations(range(old.kv_heads), new.kv_heads):
        loss = 0.0
        for j, group in enumerate(groups):
            if j in kept:
                loss += least(group, inner - new.heads_per_group)
            else:
                loss += parts["kv_groups"][j] if "kv_groups" in parts else sum(group)
        best = min(best, loss)
    return best


CASES = {
    "multi-head": Case((MULTI_HEAD,) * 2, ("heads", "neurons")),
    "grouped": Case((GROUPED,) * 2, ("kv_groups", "neurons")),
    "heads in groups": Case((GROUPED,) * 3, ("heads",)),
    "heads and groups": Case((GROUPED,) * 2, ("kv_groups", "heads", "neurons")),
    "everything": Case((LayerShape(4, 2, 24),) * 2, DENSE_KINDS),
    "odd neurons": Case((LayerShape(4, 4, 20), LayerShape(4, 4, 28)), ("neurons",)),
    "odd neurons or none": Case((LayerShape(4, 4, 20),) * 2, ("neurons", "mlp_block")),
    "groups of one head": Case((LayerShape(2, 2, 24), GROUPED), ("kv_groups", "heads", "neurons")),
    "biased": Case((MULTI_HEAD,) * 2, ("heads", "neurons"), model_type="opt"),
    "blocks": Case((MULTI_HEAD,) * 3, ("neurons", "mlp_block", "attn_block")),
    "width": Case((MULTI_HEAD,) * 2, ("heads", "neurons", "hidden")),
    "uneven": Case((MULTI_HEAD, LayerShape(2, 2, 24)), ("heads", "neurons", "hidden")),
    "uniform": Case((MULTI_HEAD,) * 3, ("heads", "neurons"), True),
    "uniform width": Case((GROUPED,) * 2, ("kv_groups", "neurons", "hidden"), True),
    "uniform mistral": Case((MULTI_HEAD,) * 3, ("heads", "neurons"), True, "mistral"),
}
each_case = pytest.mark.parametrize("name", CASES)


def random_scores(case: Case, seed: int) -> dict[str, Tensor]:
    """Small whole numbers, so that there are ties; kinds and layers on scales of their own."""
    random = torch.Generator().manual_seed(seed)
    layout = case.allocator.layout
    scores = {}
    for kind in case.kinds:
        sizes = torch.tensor(layout.sizes[kind])
        scale = torch.randint(1, 9, sizes.shape, generator=random)
        score = torch.randint(0, 10, (layout.units(kind),), generator=random)
        scores[kind] = (score * scale.repeat_interleave(sizes)).float()
    return scores


@each_case
@settings(deadline=None, max_examples=15, derandomize=True)
@given(seed=st.integers(0, 2**32), target=st.floats(0.01, 0.8))
@example(seed=0, target=0.03)
@example(seed=1, target=0.06)
def test_the_shape_is_the_cheapest_of_all_that_are_small_enough(
    name: str, seed: int, target: float
) -> None:
    case = CASES[name]
    scores, before = random_scores(case, seed), case.budget.before
    limit = before * (1 - target) + 1e-6  # counts are whole numbers
    enough = [shape for shape, after in case.shapes.items() if after <= limit]
    if not enough:
        with pytest.raises(UserError, match="out of reach"):
            case.allocator.shape(scores, target)
        return
    shape = case.allocator.shape(scores, target)
    assert shape in enough
    # At most the smallest step beyond the target, if there is such a shape, else as few as can be.
    step = before - max(after for after in case.shapes.values() if after < before)
    over = {x: max(0.0, limit - case.shapes[x] - step) for x in enough}
    closest = min(over.values())
    parts = case.split(scores)
    best = min(case.loss(x, parts) for x in enough if over[x] == closest)
    assert over[shape] == closest
    assert case.loss(shape, parts) == best


@each_case
@settings(deadline=None, max_examples=15, derandomize=True)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_masks_keep_the_counts_and_lose_the_least(
    name: str, seed: int, data: st.DataObject
) -> None:
    case = CASES[name]
    shape = data.draw(st.sampled_from(list(case.shapes)))
    scores = random_scores(case, seed)
    masks = case.allocator.masks(shape, scores)
    assert set(masks.values) == set(case.kinds)
    assert all(set(v.tolist()) <= {0.0, 1.0} for v in masks.values.values())
    keep, parts = case.split(masks.values), case.split(scores)

    def lost(kind: str, i: int) -> float:
        pairs = zip(parts[kind][i], keep[kind][i], strict=True) if kind in parts else ()
        return sum(score for score, kept in pairs if not kept)

    total = lost("hidden", 0)
    assert sum(keep.get("hidden", [[1] * 16])[0]) == shape.hidden
    for i, (old, new) in enumerate(zip(case.layers, shape.layers, strict=True)):
        assert keep.get("attn_block", [[1]] * 3)[i][0] == new.attention
        assert keep.get("mlp_block", [[1]] * 3)[i][0] == new.mlp
        total += lost("attn_block", i) + lost("mlp_block", i)
        if new.mlp:
            assert sum(keep.get("neurons", [[1] * 24] * 3)[i]) == new.neurons
            total += lost("neurons", i)
        if new.attention:
            heads = keep.get("heads", [[1] * old.heads] * 3)[i]
            inner = old.heads_per_group
            groups = [heads[j * inner : (j + 1) * inner] for j in range(old.kv_heads)]
            kept = keep.get("kv_groups", [[any(g) for g in groups]] * (i + 1))[i]
            assert sum(kept) == new.kv_heads
            for j, group in enumerate(groups):
                if kept[j]:
                    assert sum(group) == new.heads_per_group
            if "kv_groups" in parts:
                total += lost("kv_groups", i)
                removed = [
                    j * inner + r for j in range(old.kv_heads) if not kept[j] for r in range(inner)
                ]
                if "heads" in parts:  # a group's score stands for its heads
                    total -= sum(parts["heads"][i][u] for u in removed if not heads[u])
            total += lost("heads", i)
    assert total == case.loss(shape, parts)


@each_case
def test_what_is_out_of_reach_is_refused_with_the_most_that_is_not(name: str) -> None:
    case = CASES[name]
    most = 1 - min(case.shapes.values()) / case.budget.before
    assert case.allocator.maximum() == pytest.approx(most, abs=1e-9)
    scores = random_scores(case, 0)
    assert case.budget.sparsity(case.allocator.shape(scores, most)) == pytest.approx(most)
    with pytest.raises(UserError, match=f"at most {math.floor(1000 * most) / 10:.1f}%") as error:
        case.allocator.shape(scores, most + 0.002)
    assert all(kind in str(error.value) for kind in case.kinds)


def test_attention_of_the_first_layer_stays_whatever_its_score() -> None:
    case = CASES["blocks"]
    scores = {k: torch.ones(case.allocator.layout.units(k)) for k in case.kinds}
    scores["attn_block"].zero_()
    shape = case.allocator.shape(scores, 2 * 1024 / case.budget.before)
    assert [layer.attention for layer in shape.layers] == [True, False, False]


def test_neurons_that_are_no_multiple_stay_whole_or_become_one() -> None:
    layer = LayerShape(4, 4, 21)
    case = Case((layer,) * 3, ("neurons",))
    for target in (0.01, 0.1, 0.2, 0.3):
        scores = {"neurons": torch.rand(63, generator=torch.Generator().manual_seed(0))}
        shape = case.allocator.shape(scores, target)
        assert {x.neurons for x in shape.layers} <= {21, 16, 8}
        assert case.budget.sparsity(shape) >= target


@pytest.mark.parametrize("floor", [20, 9, 33, 32])
def test_any_number_of_neurons_can_be_asked_for(floor: int) -> None:
    layers = (LayerShape(4, 4, 48),) * 2
    case = Case(layers, ("neurons",))
    wanted = Shape(16, tuple(LayerShape(4, 4, floor) for _ in layers))
    allocator = Allocator(case.budget, Constraints(("neurons",), False, 32, 4, wanted))
    scores = {"neurons": torch.rand(96, generator=torch.Generator().manual_seed(0))}
    assert allocator.shape(scores, case.budget.sparsity(wanted)) == wanted


def test_uniform_shapes_of_unlike_layers_are_refused() -> None:
    case = Case((MULTI_HEAD, GROUPED), ("heads", "neurons"), True)
    with pytest.raises(UserError, match="--shapes free"):
        _ = case.allocator


def test_uniform_heads_that_no_width_can_have_are_refused() -> None:
    layers = (LayerShape(6, 2, 24),) * 2  # 16 wide
    case = Case(layers, ("neurons",), True)
    for call in (
        lambda: case.allocator.shape({"neurons": torch.ones(48)}, 0.1),
        case.allocator.maximum,
    ):
        with pytest.raises(UserError, match="use --shapes free"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.05, 0.2, 0.5])
@pytest.mark.parametrize(
    ("kv_heads", "neurons", "uniform"),
    [(32, 11008, False), (8, 14336, False), (8, 14336, True)],
    ids=["multi-head 7B", "grouped 8B", "grouped 8B uniform"],
)
def test_models_of_billions_come_within_a_tenth_of_a_point(
    kv_heads: int, neurons: int, uniform: bool, target: float
) -> None:
    family = FAMILIES["llama"]
    whole = Shape(4096, (LayerShape(32, kv_heads, neurons),) * 32)
    budget = Budget(family, whole, 128, {p.path: False for p in family.projections})
    kinds = ("heads" if kv_heads == 32 else "kv_groups", "neurons")
    allocator = Allocator(budget, Constraints(kinds, uniform, 32, 64))
    random = torch.Generator().manual_seed(0)
    scores = {k: torch.rand(allocator.layout.units(k), generator=random) for k in kinds}
    step = 3 * 4096 * 32 * 32 if uniform else 0  # one multiple of neurons in each of 32 layers
    over = budget.sparsity(allocator.shape(scores, target)) - target
    assert 0 <= over <= max(0.001, step / budget.before)


def other_cost(case: Case, seed: int) -> Cost:
    """Prices at random: of parameters beside the projections, and of KV heads."""
    random = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(0, high, (), generator=random))

    layers = range(len(case.layers))
    blocks = [tuple((draw(3), draw(20)) for _ in layers) for _ in range(2)]
    none = {"expert": ((0, 0),) * len(layers), "head": (0,) * len(layers)}
    outside = Uncounted(*blocks, rest=(draw(40), draw(100)), **none)
    return Cost(case.budget, outside, 2, tuple(draw(3000) for _ in layers), draw(50))


@each_case
@settings(deadline=None, max_examples=15, derandomize=True)
@given(seed=st.integers(0, 2**32), share=st.floats(0.3, 0.99))
def test_another_cost_is_minimised_as_exactly(name: str, seed: int, share: float) -> None:
    case = CASES[name]
    scores, cost = random_scores(case, seed), other_cost(case, seed)
    costs = {shape: cost.total(shape) for shape in case.shapes}
    before = cost.total(case.budget.shape)
    goal = Goal(cost, share * before, "memory", "leave {:.1f}".format, "ask for more")
    enough = [shape for shape in costs if costs[shape] <= goal.limit]
    if not enough:
        with pytest.raises(UserError, match=f"gates on .* leave {min(costs.values()):.1f} here"):
            case.allocator.shape(scores, goal)
        return
    shape = case.allocator.shape(scores, goal)
    assert shape in enough
    parts = case.split(scores)
    loss = case.loss(shape, parts)
    # What is within 0.1 % of the dense model's cost counts as equally far; the nearest always does.
    near = max(0.001 * before, goal.limit - max(costs[x] for x in enough))
    close = [x for x in enough if goal.limit - costs[x] <= near]
    assert loss <= min(case.loss(x, parts) for x in close)


def test_kv_heads_go_where_their_cache_is_dear() -> None:
    case = Case((GROUPED, GROUPED), ("kv_groups", "neurons"))
    scores = {k: torch.ones(case.allocator.layout.units(k)) for k in case.kinds}
    scores["kv_groups"] *= 20  # by parameters alone, neurons go
    plain = case.allocator.shape(scores, 0.2)
    assert [x.kv_heads for x in plain.layers] == [2, 2]
    cost = Cost(case.budget, kv_head=(100_000, 100_000))
    asked = Goal(cost, 0.8 * cost.total(case.budget.shape), "memory", str, "ask for more")
    assert sum(x.kv_heads for x in case.allocator.shape(scores, asked).layers) == 3


@each_case
def test_out_of_reach_names_the_gates_that_reach_further(name: str) -> None:
    case = CASES[name]
    with pytest.raises(UserError) as error:
        case.allocator.shape(random_scores(case, 0), 0.999)
    family = case.budget.family
    for kind in DENSE_KINDS:
        said = re.search(rf"with {kind} they can remove at most ([\d.]+)%", str(error.value))
        if kind in case.kinds or family.refusal(kind, case.uniform):
            assert said is None
        elif said:
            wider = Case(case.layers, (*case.kinds, kind), case.uniform, case.model_type)
            most = 1 - min(wider.shapes.values()) / case.budget.before
            assert math.floor(1000 * most) / 10 == float(said[1])
            assert most > case.allocator.maximum()


def test_heads_and_groups_that_free_unequal_amounts_are_counted_by_what_they_free() -> None:
    """Queries with a gate of their own: two ways of as many steps free 11 and 12 units."""
    case = Case((GROUPED,), ("kv_groups", "heads"), model_type="qwen3_5_text")
    scores = {
        "kv_groups": torch.tensor([1.0, 50]),
        "heads": torch.tensor([0.42, 0.5, 40, 0.05, 0.05, 40]),
    }
    assert case.allocator.shape(scores, 0.3).layers == (LayerShape(2, 2, 24),)
