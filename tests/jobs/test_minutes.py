"""`--minutes`: a plan of plain settings, from rates that are measured, and steps till the end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nuteprune.console import Output
from nuteprune.errors import UserError
from nuteprune.files import file_sum
from nuteprune.jobs import minutes, vocab
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.minutes import FEWEST, Rates, seconds_of, within_minutes
from nuteprune.plan.trial import StepTimes
from nuteprune.run_folder import RUN, SETTINGS
from nuteprune.train.own_answers import WITHOUT_TEACHER
from tests.undrawn import leave_blank
from tests.unplanned import leave_unplanned

TINY = ("--length", 16, "--batch-size", 2, "--set", "neuron_multiple=8", "--set", "eval_blocks=8")


@pytest.mark.parametrize(
    ("said", "seconds"), [("10", 600), ("2h", 7200), ("90s", 90), ("1.5m", 90), (0.5, 30)]
)
def test_minutes_are_read(said: Any, seconds: float) -> None:
    assert seconds_of(said) == seconds


@pytest.mark.parametrize("said", ["", "0", "-3", "ten", "5d", "inf", "nan"])
def test_what_is_no_time_is_refused(said: str) -> None:
    with pytest.raises(UserError, match="pass minutes"):
        seconds_of(said)


@pytest.fixture
def pruned(run: Any, tiny_inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prunes the tiny model; returns code, stderr and record."""
    model, text = tiny_inputs
    leave_blank(monkeypatch.setattr)

    def call(out: str, *args: Any, **_: Any) -> tuple[int, str, dict[str, Any]]:
        common = ("--data", text, "--sparsity", 0.2, "--out", tmp_path / out, "--json", *TINY)
        code, stdout, stderr = run("prune", model, *common, *args)
        return code, stderr, json.loads(stdout.splitlines()[-1]) if code == 0 else {}

    return call


def use_rates(
    monkeypatch: pytest.MonkeyPatch, block: float, steps: int = 11, first: float = 0.0
) -> None:
    """Let every machine be as fast, and let there be time for so many steps in the end."""
    monkeypatch.setattr(minutes, "_measured", lambda _: Rates(block, block / 40, first=first))
    monkeypatch.setattr(minutes, "steps_in_time_of", lambda *_: lambda *_: steps)


@pytest.mark.parametrize(
    ("block", "blocks"),
    [(0.01, 32), (0.5, 32), (1.3, 12), (1.7, 8)],
)
def test_a_slower_machine_reads_less_before_the_first_step(
    pruned: Any, monkeypatch: pytest.MonkeyPatch, block: float, blocks: int
) -> None:
    use_rates(monkeypatch, block)
    leave_unplanned(monkeypatch.setattr)
    code, said, record = pruned("out", "--minutes", 4, "--dry-run")
    assert code == 0, said
    [line] = [x for x in said.splitlines() if x.startswith("Time")]
    assert f" {blocks} blocks for the scores, about " in line
    assert "max_steps" not in record


@pytest.mark.slow
def test_a_run_is_repeated_from_its_record_without_a_clock(
    pruned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_rates(monkeypatch, 1.5)
    code, said, record = pruned("timed", "--minutes", 4)
    assert code == 0, said
    config = record["config"]
    assert config["max_steps"] == 11  # what there was time for in the end
    assert config["text_blocks"] != 22
    assert "minutes" not in config
    keys = ("max_steps", "text_blocks", "calibration_blocks")
    given = [x for key in keys if key in config for x in ("--set", f"{key}={config[key]}")]
    code, said, _ = pruned("again", *given)
    assert code == 0, said
    one, other = (file_sum(tmp_path / x / "model.safetensors") for x in ("timed", "again"))
    assert one == other


@pytest.mark.slow
def test_a_run_goes_on_with_the_plan_that_it_began_with(
    pruned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_rates(monkeypatch, 1.5)
    code, said, record = pruned("out", "--minutes", 4)
    assert code == 0, said
    before = json.loads((tmp_path / "out" / RUN / SETTINGS).read_text())
    assert before["max_steps"] == 11
    monkeypatch.setattr(minutes, "_measured", lambda _: pytest.fail("measured again"))
    code, said, again = pruned("out", "--minutes", 9, "--resume")
    assert code == 0, said
    assert again["config"] == record["config"]


@pytest.mark.slow
def test_each_target_goes_on_with_the_steps_that_it_began_with(
    pruned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        use_rates(patch, 1.5)
        steps = iter((7, 3))
        patch.setattr(minutes, "steps_in_time_of", lambda *_: lambda *_: next(steps))
        code, said, _ = pruned("out", "--minutes", 9, "--sparsity", "0.2,0.3")
    assert code == 0, said
    folders = [tmp_path / "out" / x for x in ("sparsity-0.2", "sparsity-0.3")]
    before = [file_sum(x / "model.safetensors") for x in folders]
    monkeypatch.setattr(minutes, "_measured", lambda _: pytest.fail("measured again"))
    code, said, _ = pruned("out", "--minutes", 9, "--sparsity", "0.2,0.3", "--resume")
    assert code == 0, said
    kept = [json.loads((x / RUN / SETTINGS).read_text())["max_steps"] for x in folders]
    assert kept == [7, 3]
    assert [file_sum(x / "model.safetensors") for x in folders] == before


@pytest.mark.slow
def test_the_steps_fill_the_time_that_is_left(
    pruned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a step of four seconds, 120 s less what judging takes are some 25 steps."""
    monkeypatch.setattr(minutes, "_measured", lambda _: Rates(0.3, 0.001))
    monkeypatch.setattr(minutes, "step_times", lambda *_, **__: StepTimes(4.0))
    monkeypatch.setattr(minutes, "BESIDE", 10)  # of two to a step
    code, said, record = pruned("out", "--minutes", "120s")
    assert code == 0, said
    spent = sum(x["seconds"] for name, x in record["stages"].items() if name != "teach")
    steps = record["config"]["max_steps"]
    assert 100 - 2 * spent - 40 < 4 * steps <= 100  # the rest of the time is spent on loading


def test_later_targets_are_not_charged_twice_for_judging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dense model took 10 s, each result 10 s and what is judged beside it."""
    monkeypatch.setattr(minutes, "step_times", lambda *_, **__: StepTimes(4.0))
    monkeypatch.setattr(minutes.time, "monotonic", lambda: 0.0)
    costs = {"judge": {"seconds": 10.0}}
    run = SimpleNamespace(targets=["small", "smaller"], products=SimpleNamespace(costs=costs))
    args = SimpleNamespace(sequences_per_step=4)
    first, second = (SimpleNamespace(target=x, args=args) for x in run.targets)
    job: Any = SimpleNamespace(minutes=10, settings={}, started=0.0, resume=False, after=0)
    monkeypatch.setattr(minutes, "is_stated", lambda _: False)
    beside = minutes.BESIDE * 1.0
    before: Any = minutes.steps_in_time_of(job)
    assert before(run, first) == int((600 - 2 * (10 + beside)) / 2 / 4)
    costs["judge"]["seconds"] += 10 + beside
    assert before(run, second) == int((600 - (10 + beside)) / 4)


def test_time_is_left_to_judge_a_dense_model_in_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is judged beside the first result, so nothing was measured before the steps."""
    monkeypatch.setattr(minutes, "step_times", lambda *_, **__: StepTimes(4.0))
    monkeypatch.setattr(minutes.time, "monotonic", lambda: 0.0)
    products = SimpleNamespace(costs={})
    targets = ["small", "smaller"]
    run = SimpleNamespace(targets=targets, products=products, held_out={"text": range(100)})
    first = SimpleNamespace(target="small", args=SimpleNamespace(sequences_per_step=4))
    job: Any = SimpleNamespace(minutes=10, settings={}, started=0.0, resume=False, after=0)
    monkeypatch.setattr(minutes, "is_stated", lambda _: False)
    before: Any = minutes.steps_in_time_of(job)
    judging = 3 * 100 * minutes.JUDGE + 2 * minutes.BESIDE
    assert before(run, first) == int((600 - judging) / 2 / 4)


def test_own_answers_are_written_as_a_whole() -> None:
    taught = StepTimes(2.0, answers=10.0)
    assert taught.of(16) == 16 * 2 + 2 * WITHOUT_TEACHER * 2 + 10
    assert taught.of(4) == 4 * 2  # one step is not worth the answers
    assert taught.of(60) == 60 * 2 + 9 * WITHOUT_TEACHER * 2 + 2 * 10
    for seconds in range(0, 200, 7):
        steps = taught.within(seconds)
        assert taught.of(steps) <= max(0, seconds) < taught.of(steps + 1)
    assert StepTimes(2.0).of(16) == 32


def test_too_little_time_is_refused_with_what_is_needed(
    pruned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_rates(monkeypatch, 10.0)
    code, said, _ = pruned("out", "--minutes", 1)
    assert code == 2
    assert "is too little time: on this machine" in said
    assert not (tmp_path / "out").exists()


def test_the_demo_takes_longer_where_its_minutes_are_too_few(
    tiny_inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_rates(monkeypatch, 10.0)
    model, text = map(str, tiny_inputs)
    settings = {"target_sparsity": 0.2, "neuron_multiple": 8}
    job = PruneJob(model, tmp_path / "out", data=text, length=16, minutes=1, settings=settings)
    job.may_exceed = True
    planned = within_minutes(job, tmp_path / "scratch", Output(quiet=True))
    assert planned.settings["calibration_blocks"] == 8
    assert planned.settings["max_steps"] == FEWEST


def test_what_comes_after_the_run_leaves_fewer_steps(
    tiny_inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_rates(monkeypatch, 0.1)
    model, text = map(str, tiny_inputs)
    settings = {"target_sparsity": 0.2, "neuron_multiple": 8}
    job = PruneJob(model, tmp_path / "out", data=text, length=16, minutes=4, settings=settings)
    steps = []
    for job.after in (0.0, 100.0):
        planned = within_minutes(job, tmp_path / "scratch", Output(quiet=True))
        steps.append(planned.settings["max_steps"])
    assert steps[0] > steps[1] + 5


def test_text_takes_a_while_however_little_it_is(
    tiny_inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = map(str, tiny_inputs)
    settings = {"target_sparsity": 0.2, "neuron_multiple": 8}
    job = PruneJob(model, tmp_path / "out", data=text, length=16, minutes=4, settings=settings)
    steps = []
    for first in (0.0, 40.0):
        use_rates(monkeypatch, 0.1, first=first)
        planned = within_minutes(job, tmp_path / "scratch", Output(quiet=True))
        steps.append(planned.settings["max_steps"])
    assert steps[0] > steps[1] + 5


def test_a_large_head_takes_its_time_in_steps_and_not_in_the_refit(
    tiny_inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are as fast with a larger head leave a smaller decoder to refit."""
    model, text = map(str, tiny_inputs)
    settings = {"target_sparsity": 0.2, "neuron_multiple": 8}
    job = PruneJob(model, tmp_path / "out", data=text, length=16, minutes=4, settings=settings)
    use_rates(monkeypatch, 0.3)
    shares, steps = [], []
    share_of, sizes = minutes._decoder_share, iter((1, 8))

    def with_head(prepared: Any) -> float:
        weight = prepared.anatomy.embedding.weight
        rows = torch.empty(next(sizes) * weight.shape[0], weight.shape[1])
        monkeypatch.setattr(prepared.anatomy.embedding, "weight", torch.nn.Parameter(rows))
        shares.append(share_of(prepared))
        return shares[-1]

    monkeypatch.setattr(minutes, "_decoder_share", with_head)
    for _ in range(2):
        planned = within_minutes(job, tmp_path / "scratch", Output(quiet=True))
        steps.append(planned.settings["max_steps"])
    decoder, head = shares[0], 1 - shares[0]
    assert shares[-1] == pytest.approx(decoder / (decoder + 8 * head))
    assert steps[1] > steps[0] + 5


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--steps", 5), "pass one of them"),
        (("--set", "progressive=true"), "ramp"),
        (("--set", "text_blocks=40"), "or leave text_blocks out"),
    ],
)
def test_two_words_on_how_long_contradict(pruned: Any, more: tuple[Any, ...], why: str) -> None:
    code, said, _ = pruned("out", "--minutes", 5, *more)
    assert code == 2
    assert why in said


@pytest.mark.slow
def test_cutting_the_vocabulary_is_part_of_the_time(
    pruned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.SELF_TOKENS", 100)
    monkeypatch.setattr("nuteprune.jobs.fewer_tokens.SELF_TOKENS_JUDGED", 50)
    use_rates(monkeypatch, 0.3)
    plans: list[float] = []
    share, cut, passed = minutes.shared_out, vocab.cut, time.monotonic
    late = [0.0]

    def cut_slowly(*given: Any) -> Any:
        record = cut(*given)
        late[0] = 100.0
        return record

    def watched(job: Any, trial: Any, rates: Any, seconds: float, *rest: Any) -> Any:
        assert trial.model.anatomy.embedding.weight.shape[0] == 280
        plans.append(seconds)
        return share(job, trial, rates, seconds, *rest)

    monkeypatch.setattr(vocab, "cut", cut_slowly)
    monkeypatch.setattr(minutes, "shared_out", watched)
    monkeypatch.setattr("time.monotonic", lambda: passed() + late[0])
    code, said, record = pruned("out", "--minutes", 8, "--vocab", 280)
    assert code == 0, said
    assert 480 - 100 - 60 < plans[0] < 480 - 100
    assert record["config"]["vocab"] == 280
    assert record["seconds"] > 100
