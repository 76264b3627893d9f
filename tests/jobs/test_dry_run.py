"""What a dry run says of a run's phases, against the plan of the config and against arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from nuteprune import NutePruneTrainer
from nuteprune.console import Output
from nuteprune.data.blocks import BlockDataset
from nuteprune.jobs.dry_run import print_dry_run
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.planned import Rate
from nuteprune.jobs.settings import make_job
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.extrapolate import Need, Unplanned
from nuteprune.train.kernels import on_cpu
from nuteprune.train.phases import FORMULA, Phase, Run

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
LENGTH, JUDGED = 16, 12


def found(model: PreTrainedModel, folder: Path, sparsity: float = 0.2) -> dict[str, Any]:
    """Do a dry run of a model, which took 5 s to write."""
    given = {"target_sparsity": sparsity, "max_steps": 3, "neuron_multiple": 4, "length": LENGTH}
    asked = {"model": "unused", "out": folder, **given}
    job = make_job(PruneJob, NutePruneConfig, asked)
    args = NutePruneConfig(output_dir=str(folder), use_cpu=True, **job.settings)
    tokens = torch.randint(3, 90, (args.blocks, LENGTH))
    trainer = NutePruneTrainer(model, args, BlockDataset(tokens))
    return print_dry_run(job, trainer, 5.0, JUDGED, Output(quiet=True))


def test_work_in_fp32_has_a_rate_of_its_own() -> None:
    phase = Phase("any", Need(0, flops=700, fine=200), read=60)
    assert Rate(plain=100.0, fine=10.0).seconds(phase) == 5 + 20
    assert Rate(plain=100.0, fine=10.0, read=30.0).seconds(phase) == 5 + 20 + 2


@pytest.mark.slow(seconds=8)
def test_all_phases_are_planned_at_the_rate_of_a_real_step(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    config = copy.deepcopy(model.config)
    dry = found(model, tmp_path)
    phases = {x["phase"]: x for x in dry["phases"]}
    args = NutePruneConfig(
        output_dir=str(tmp_path), use_cpu=True, target_sparsity=0.2, max_steps=3, neuron_multiple=4
    )
    planned = Run.of(config, args, LENGTH, torch.float32, stored=torch.float32).phases()
    peaks = on_cpu({x.name: x.need for x in planned})
    assert list(phases) == [*peaks, "judging the results"]
    for phase in planned:
        assert phases[phase.name]["peak_bytes"] == round(peaks[phase.name])
    assert phases["step, fixed masks"]["seconds"] == pytest.approx(3 * dry["seconds_per_step"])
    assert phases["writing text"]["seconds"] == 5
    rate = phases["step, fixed masks"]["flops"] / phases["step, fixed masks"]["seconds"]
    assert phases["re-fit"]["seconds"] == pytest.approx(phases["re-fit"]["flops"] / rate)
    # Three batches of four blocks each.
    judging = {x.name: x.need.flops for x in planned}["judging the dense model"]
    assert phases["judging the dense model"]["flops"] == 3 * judging
    assert phases["judging the results"]["how"] == FORMULA
    assert dry["seconds"] == pytest.approx(sum(x["seconds"] for x in dry["phases"]))


@pytest.mark.slow(seconds=5)
def test_the_end_begins_with_the_moments(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    config, args = copy.deepcopy(model.config), NutePruneConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no",
        target_sparsity=0.2, max_steps=1, neuron_multiple=4, calibration_blocks=1, lora_rank=64,
    )  # fmt: skip
    trainer = NutePruneTrainer(
        model, args, BlockDataset(torch.randint(3, 90, (args.blocks, LENGTH)))
    )
    trainer.train()
    assert trainer.optimizer is not None
    states = [x for state in trainer.optimizer.state.values() for x in state.values()]
    learned = [x for x in trainer.model.parameters() if x.requires_grad]
    held = sum(x.nbytes for x in (*states, *learned))
    run = Run.of(config, args, LENGTH, torch.float32, stored=torch.float32)
    planned = next(x.need.peak for x in run.after_steps() if x.name == "finalize")
    assert planned == pytest.approx(held, rel=0.01)


@pytest.mark.slow(seconds=5)
def test_inversions_take_time_too(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """In half precision they are the work that is not: wide MLPs take their cube."""
    neurons = 384
    config = tiny_model("llama", intermediate_size=neurons, num_hidden_layers=2).config
    args = NutePruneConfig(
        output_dir=str(tmp_path), use_cpu=True, target_sparsity=0.2, neuron_multiple=4
    )
    phases = Run.of(config, args, LENGTH, torch.bfloat16).before_steps()
    needs = {phase.name: phase.need for phase in phases}
    assert needs["scoring"].fine > config.num_hidden_layers * neurons**3
    assert needs["re-fit"].fine > config.num_hidden_layers * neurons**3 / 3
    assert needs["judging the dense model"].fine < needs["judging the dense model"].flops


def test_what_cannot_be_planned_is_reckoned_by_steps(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = found(tiny_model("mixtral"), tmp_path)
    assert "phases" not in dry
    assert dry["seconds"] > 5 + 3 * dry["seconds_per_step"]


def test_what_is_reckoned_counts_rounds_and_re_fits(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 50 %: scored twice, re-fitted at the stop, where prices are measured, and at the end."""

    def unplanned(*_: Any) -> None:
        raise Unplanned("not this time")

    monkeypatch.setattr("nuteprune.jobs.dry_run._planned", unplanned)
    monkeypatch.setattr("nuteprune.jobs.dry_run.seconds_per_step", lambda _: 2.0)
    dry = found(tiny_model("llama"), tmp_path, 0.5)
    assert dry["seconds"] == 5 + 2 * (3 + (96 * 2 + 144 * 3) / 4)


def test_the_peak_of_a_step_is_counted_from_its_beginning(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def step(_: NutePruneTrainer) -> float:
        told.append("step")
        return 1.0

    monkeypatch.setattr("nuteprune.jobs.dry_run.reset_peak", lambda: told.append("reset"))
    monkeypatch.setattr("nuteprune.jobs.dry_run.seconds_per_step", step)
    found(tiny_model("mixtral"), tmp_path)
    assert told == ["reset", "step"]
