from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nuteprune.distill.coforward import DENSE
from nuteprune.errors import RunFailed
from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.shape import LayerShape, Shape
from nuteprune.progressive.teachers import Schedule, Teachers

LAYOUT = Layout(Shape(16, (LayerShape(4, 2, 6), LayerShape(4, 2, 6))), 4)

MAPS = Path("/proc/self/maps")


def snapshot(seed: int) -> tuple[Masks, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    masks = {k: torch.rand(LAYOUT.units(k), generator=random) for k in ("heads", "neurons")}
    # Of bfloat16 precision, which is what snapshots keep of LoRA.
    lora = {f"0.{i}.A": torch.randn(2, 16, generator=random).bfloat16().float().T for i in range(2)}
    return Masks(LAYOUT, masks), lora


def filled(folder: Path, count: int) -> Teachers:
    teachers = Teachers(folder, LAYOUT)
    for i in range(count):
        teachers.record((i + 1) / 100, *snapshot(i))
    return teachers


def assert_plays(teachers: Teachers, index: int, seed: int) -> None:
    masks, lora = snapshot(seed)
    role = teachers.role(index)
    assert role.masks is not None
    assert role.lora is not None
    lora = {key: value.bfloat16().float() for key, value in lora.items()}  # in half the space
    for ours, theirs in ((role.masks.values, masks.values), (role.lora, lora)):
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_is_recorded_comes_back(tmp_path: Path) -> None:
    teachers = filled(tmp_path / "teachers", 3)
    assert len(teachers) == 3
    assert teachers.newest == 0.03
    for i in (2, 0, 1, 2):
        assert_plays(teachers, i, seed=i)
    assert teachers.role(-1) is DENSE
    assert not list((tmp_path / "teachers").glob("*.partial"))


def test_a_snapshot_does_not_follow_its_source(tmp_path: Path) -> None:
    teachers = Teachers(tmp_path, LAYOUT)
    masks, lora = snapshot(0)
    teachers.record(0.01, masks, lora)
    for tensor in (*masks.values.values(), *lora.values()):
        tensor.zero_()
    assert_plays(teachers, 0, seed=0)


@pytest.mark.parametrize("keep", [False, True])
def test_at_most_one_is_in_memory(tmp_path: Path, keep: bool) -> None:
    teachers = filled(tmp_path, 5)
    teachers.keep = keep
    first = teachers.role(0)
    assert (teachers.role(0) is first) == keep
    gone = weakref.ref(first)
    del first
    assert (gone() is None) == (not keep)
    teachers.role(1)
    assert gone() is None


@pytest.mark.skipif(not MAPS.is_file(), reason="asks Linux what is mapped")
def test_masks_do_not_keep_the_file_in_memory(tmp_path: Path) -> None:
    role = filled(tmp_path, 1).role(0)
    masks = role.masks
    del role
    assert masks is not None
    assert str(tmp_path) not in MAPS.read_text()


def test_lora_weights_come_in_the_dtype_asked_for_and_masks_in_fp32(tmp_path: Path) -> None:
    teachers = filled(tmp_path, 1)
    half, whole = teachers.role(0, dtype=torch.bfloat16), Teachers(tmp_path, LAYOUT)
    whole.restore(teachers.sparsities, teachers.sums)
    role = whole.role(0)
    for key, value in half.lora.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value.float(), role.lora[key])
    for key, value in half.masks.values.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, role.masks.values[key])


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    killed = filled(tmp_path, 4)
    assert_plays(killed, 2, seed=2)
    resumed = Teachers(tmp_path, LAYOUT)
    for teachers in (resumed, killed):
        teachers.restore([0.01, 0.02], killed.sums[:2])
        assert teachers.newest == 0.02
        teachers.record(0.05, *snapshot(9))
        assert teachers.sparsities == [0.01, 0.02, 0.05]
        assert_plays(teachers, 1, seed=1)
        assert_plays(teachers, 2, seed=9)


def test_a_snapshot_cut_off_while_written_is_not_there(tmp_path: Path, monkeypatch) -> None:
    teachers = filled(tmp_path, 1)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RunFailed, match=r"cannot write the teacher .*disk full; make room"):
        teachers.record(0.02, *snapshot(1))
    assert len(teachers) == 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("target", "spacing", "lag"), [(0.05, 0.005, 5), (0.2, 0.01, 10), (0.5, 0.01, 10)]
)
def test_a_run_climbs_behind_its_teachers_and_walks_back_to_the_intact_model(
    target: float, spacing: float, lag: int
) -> None:
    plan = Schedule(target, 1000, 1.0)
    assert (plan.spacing, plan.lag) == (pytest.approx(spacing), lag)
    assert plan.lag * plan.spacing <= target / 2 + 1e-9  # so that even small targets get teachers

    taken: list[float] = []
    served = []
    for sparsity in torch.linspace(0, target, 1001, dtype=torch.float64).tolist():
        served.append(plan.growing(len(taken)))
        if plan.due(sparsity, taken[-1] if taken else 0.0):
            taken.append(sparsity)
    assert len(taken) == round(target / spacing)
    assert taken == pytest.approx([spacing * (i + 1) for i in range(len(taken))], abs=target / 900)
    assert set(served[: served.index(0)]) == {-1}  # the dense model until there are enough
    assert served[served.index(0) :] == sorted(served[served.index(0) :])

    last = plan.growing(len(taken))
    assert last == len(taken) - 1 - lag
    back = [plan.returning(len(taken), i / 1000) for i in range(1000)]
    assert (back[0], back[-1]) == (last, -1)
    steps = [back.count(i) for i in range(last, -2, -1)]  # each serves as long as any other
    assert sum(steps) == 1000
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("target", "ramp_steps", "lag"),
    [(0.2, 40, 10), (0.2, 10, 5), (0.5, 4, 2), (0.05, 40, 5), (0.05, 6, 3), (0.3, 1, 1)],
)
def test_the_lag_is_at_most_half_of_the_snapshots_that_a_ramp_leaves(
    target: float, ramp_steps: int, lag: int
) -> None:
    plan = Schedule(target, ramp_steps, 1.0)
    assert plan.lag == lag
    taken: list[float] = []
    for step in range(ramp_steps):
        sparsity = target * (step + 1) / ramp_steps
        if plan.due(sparsity, taken[-1] if taken else 0.0):
            taken.append(sparsity)
    assert len(taken) >= 2 * lag or ramp_steps == 1
    served = {plan.returning(len(taken), i / 100) for i in range(100)}
    assert served == set(range(-1, max(0, len(taken) - lag)))


@pytest.mark.parametrize(
    ("has_snapshots", "taught_by"),
    [(True, [-1, -1, -1, 1, 1, 0, -1, -1, -1, -1]), (False, [-1] * 10)],
)
def test_each_step_has_its_teacher(has_snapshots: bool, taught_by: list[int]) -> None:
    plan = Schedule(0.4, 10, 0.4, snapshots_teach=has_snapshots)
    counts = [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]  # a snapshot at the end of each step of the ramp
    assert [plan.teacher(i, count) for i, count in enumerate(counts)] == taught_by
    assert plan.due(0.1, 0.0) == has_snapshots


def test_a_run_too_short_for_teachers_learns_from_the_intact_model() -> None:
    plan = Schedule(0.2, 40, 1.0)
    for count in (0, 1):
        assert plan.growing(count) == -1
        assert {plan.returning(count, progress) for progress in (0.0, 0.5, 0.999)} == {-1}


def test_a_run_with_fewer_snapshots_than_planned_walks_back_from_the_middle_one() -> None:
    plan = Schedule(0.2, 40, 1.0)
    assert plan.lag == 10
    assert plan.growing(7) == -1
    assert [plan.returning(7, i / 5) for i in range(5)] == [3, 2, 1, 0, -1]


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
        assert (schedule.freeze_step, schedule.has_snapshots) == (freeze_step, False)
    assert Schedule(0.2, 10, 0.01).freeze_step == 1
    assert Schedule(0.2, 10, 0.4, freeze_share=0.6).freeze_step == 6


def test_the_way_back_takes_the_rest_or_as_long_as_the_ramp() -> None:
    published, short = Schedule(0.2, 10, 0.6), Schedule(0.2, 10, 0.2)
    assert published.rested(9) == pytest.approx(1)
    assert published.rested(7) == pytest.approx(1 / 2)
    assert [short.rested(i) for i in (2, 3, 4)] == pytest.approx([1 / 2, 1, 3 / 2])
