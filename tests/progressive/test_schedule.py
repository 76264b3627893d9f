from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nuteprune.progressive.schedule import Lagrangian, Schedule


@given(
    target=st.floats(0.01, 0.9),
    steps=st.integers(1, 200),
    ramp_share=st.floats(0, 1),
)
def test_any_number_of_steps_climbs_to_the_target_and_stays(
    target: float, steps: int, ramp_share: float
) -> None:
    schedule = Schedule(target, steps, ramp_share)
    asked = [schedule.sparsity(i) for i in range(steps)]
    assert asked == sorted(asked)
    assert asked[0] > 0
    assert asked[-1] == pytest.approx(target)
    reached = [value == pytest.approx(target, abs=1e-12) for value in asked]
    assert reached == [schedule.rests(i) for i in range(steps)]
    assert reached.index(True) + 1 == pytest.approx(max(1, steps * ramp_share), abs=0.5001)


def test_linear_by_hand() -> None:
    linear = Schedule(0.4, 8, 0.5)
    assert [linear.sparsity(i) for i in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_without_a_ramp_masks_are_fixed_before_the_first_step_or_where_asked_for() -> None:
    at_once, later = Schedule(0.2, 10, 0.0), Schedule(0.2, 10, 0.0, freeze_share=0.4)
    for schedule, freeze_step in ((at_once, 0), (later, 4)):
        assert [schedule.sparsity(i) for i in range(10)] == pytest.approx([0.2] * 10)
        assert (schedule.freeze_step, schedule.ramps) == (freeze_step, False)
    assert Schedule(0.2, 10, 0.01).freeze_step == 1
    assert Schedule(0.2, 10, 0.4, freeze_share=0.6).freeze_step == 6


def test_the_way_back_takes_the_rest_or_as_long_as_the_ramp() -> None:
    published, short = Schedule(0.2, 10, 0.6), Schedule(0.2, 10, 0.2)
    assert published.rested(9) == pytest.approx(1)
    assert published.rested(7) == pytest.approx(1 / 2)
    assert [short.rested(i) for i in (2, 3, 4)] == pytest.approx([1 / 2, 1, 3 / 2])


def test_penalty_and_its_slopes_by_hand() -> None:
    lagrangian = Lagrangian()
    with torch.no_grad():
        lagrangian.lambda1.fill_(-2.0)
        lagrangian.lambda2.fill_(10.0)
    sparsity = torch.tensor(0.2, requires_grad=True)
    penalty = lagrangian(sparsity, 0.3)
    penalty.backward()
    assert penalty.item() == pytest.approx(-2 * -0.1 + 10 * 0.01)
    assert sparsity.grad == pytest.approx(-2 + 2 * 10 * -0.1)
    # Ascent on these makes a model that is too dense pay more and more for it.
    assert lagrangian.lambda1.grad == pytest.approx(-0.1)
    assert lagrangian.lambda2.grad == pytest.approx(0.01)
