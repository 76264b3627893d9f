"""What a dry run says of a run's phases, against the plan of the config and against arithmetic."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune import NutePruneTrainer
from nuteprune.console import Output, silent
from nuteprune.data.training_text import BlockDataset
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.planned import Rate, print_dry_run
from nuteprune.jobs.prune_run import trainer_config
from nuteprune.jobs.read_settings import make_job
from nuteprune.plan.need import Need, Unplanned, on_cpu
from nuteprune.plan.phases import Phase, Plan
from nuteprune.plan.trial import BESIDE
from nuteprune.plan.walk import Walk
from nuteprune.products import Products
from nuteprune.progressive.config import ProgressiveConfig
from nuteprune.run import Run
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.prepare import prepare
from tests.unplanned import leave_unplanned

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
LENGTH, JUDGED = 16, 12


def found(
    model: PreTrainedModel,
    folder: Path,
    sparsity: float = 0.2,
    output: Output = Output(quiet=True),  # noqa: B008
    tokenizer: PreTrainedTokenizerBase | None = None,
    **more: Any,
) -> Any:
    """Do a dry run of a model that writes nothing."""
    given = {"target_sparsity": sparsity, "max_steps": 3, "neuron_multiple": 4, "length": LENGTH}
    asked = {"model": "unused", "out": folder, "shares": [1.0], **given, **more}
    job = make_job(PruneJob, asked)
    args = trainer_config(dataclasses.replace(job, device="cpu"), folder)
    prepared = prepare(model, args)
    text = SimpleNamespace(
        to_write=0, training=BlockDataset(torch.randint(3, 90, (args.blocks, LENGTH)))
    )
    run = Run(
        model=prepared,
        args=args,
        text=cast(Any, text),
        held_out={"random": torch.zeros(JUDGED, LENGTH, dtype=torch.long)},
        products=Products(None, {}),
        progress=silent,
        first=import_module(args.PIPELINE).TRAINER(
            prepared, args, text.training, processing_class=tokenizer
        ),
        trainer_of=lambda _: run.first,
        reload=lambda _: model,
        run_folder_of=lambda _: folder,
        resumes=False,
        around=None,
        about=dict,
    )
    return print_dry_run(job, run, output)


def test_work_in_fp32_has_a_rate_of_its_own() -> None:
    phase = Phase("any", Need((0,), flops=700, fine=200), read=60)
    assert Rate(plain=100.0, fine=10.0).seconds(phase) == 5 + 20
    assert Rate(plain=100.0, fine=10.0, read=30.0).seconds(phase) == 5 + 20 + 2


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("more", [{}, {"progressive": True, "ramp_share": 0.5}], ids=["", "ramp"])
def test_all_stages_are_planned_at_the_rate_of_a_real_step(
    more: dict[str, Any], tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    config = copy.deepcopy(model.config)
    more = {"calibration_blocks": 2, **more}
    dry = found(model, tmp_path, **more)
    phases = {x["phase"]: x for x in dry["phases"]}
    given = {"target_sparsity": 0.2, "max_steps": 3, "neuron_multiple": 4, **more}
    kind = ProgressiveConfig if "progressive" in more else NutePruneConfig
    args = kind(output_dir=str(tmp_path), use_cpu=True, **given)
    how: dict[str, Any] = {"stored": torch.float32, "judged": JUDGED, "own": 0.0}
    planned = Plan.of(config, args, LENGTH, torch.float32, **how).phases()
    peaks = on_cpu({x.name: x.need for x in planned})
    assert list(phases) == list(peaks)
    for phase in planned:
        assert phases[phase.name]["peak_bytes"] == pytest.approx(peaks[phase.name], rel=0.02)
    assert phases["teach"]["seconds"] == pytest.approx(3 * dry["seconds_per_step"])
    rate = phases["teach"]["flops"] / phases["teach"]["seconds"]
    beside = BESIDE * dry["seconds_per_step"] / args.sequences_per_step  # answers and context
    assert phases["judge"]["seconds"] == pytest.approx(beside + phases["judge"]["flops"] / rate)
    assert phases["refit"]["seconds"] == pytest.approx(phases["refit"]["flops"] / rate)
    assert dry["seconds"] == pytest.approx(sum(x["seconds"] for x in dry["phases"]))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow(seconds=15)
def test_a_model_without_a_chat_template_is_planned_to_read_no_own_answers(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerBase,
    tiny_chat_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    def taught(tokenizer: PreTrainedTokenizerBase, **more: Any) -> float:
        small = {"num_hidden_layers": 2, "vocab_size": 512}
        more |= {"calibration_blocks": 2, "max_steps": 20, "tokenizer": tokenizer}
        dry = found(tiny_model("llama", **small), tmp_path, **more)
        [flops] = [x["flops"] for x in dry["phases"] if x["phase"] == "teach"]
        return float(flops)

    none = taught(tiny_tokenizer)
    assert none == taught(tiny_chat_tokenizer, unlikelihood=0)
    assert none < taught(tiny_chat_tokenizer)


@pytest.mark.slow(seconds=5)
def test_where_no_step_is_run_a_dry_run_says_so(
    tiny_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    leave_unplanned(monkeypatch.setattr)
    monkeypatch.setattr("nuteprune.jobs.planned.seconds_per_step", lambda _: 1 / 0)
    dry = found(tiny_model("llama"), tmp_path, output=Output(), max_steps=0)
    assert dry["seconds_per_step"] is None
    assert "no step was run" in capsys.readouterr().out


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
    run = Plan.of(config, args, LENGTH, torch.float32, stored=torch.float32)
    assert run.cut()[0].need.peak == pytest.approx(held, rel=0.01)


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

    def of(stage: Callable[[Walk], Need]) -> Need:
        return stage(Walk(config, args, LENGTH, torch.bfloat16))

    assert of(lambda x: x.score(6, 2)).fine > config.num_hidden_layers * neurons**3
    assert of(lambda x: x.refit(8)).fine > config.num_hidden_layers * neurons**3 / 3
    judge = of(Walk.judge)
    assert judge.fine < judge.flops


def test_what_cannot_be_planned_is_reckoned_by_steps(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = found(tiny_model("mixtral"), tmp_path)
    assert "phases" not in dry
    assert dry["seconds"] > 3 * dry["seconds_per_step"]
    dry = found(tiny_model("mixtral"), tmp_path, output=Output(), max_steps=0)
    assert dry["seconds"] is None
    assert "Cost    not known: no step was run" in capsys.readouterr().out


def test_what_is_reckoned_counts_rounds_and_re_fits(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 50 %: scored twice, refitted at the stop and at the end."""

    def unplanned(*_: Any) -> None:
        raise Unplanned("not this time")

    monkeypatch.setattr("nuteprune.jobs.planned._planned", unplanned)
    monkeypatch.setattr("nuteprune.jobs.planned.seconds_per_step", lambda _: 2.0)
    dry = found(tiny_model("llama"), tmp_path, 0.5)
    assert dry["seconds"] == 2 * (3 + (96 * 2 + 144 * 2) / 4)


def test_the_peak_of_a_step_is_counted_from_its_beginning(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def step(_: NutePruneTrainer) -> float:
        told.append("step")
        return 1.0

    monkeypatch.setattr("nuteprune.jobs.planned.reset_peak", lambda: told.append("reset"))
    monkeypatch.setattr("nuteprune.jobs.planned.seconds_per_step", step)
    found(tiny_model("mixtral"), tmp_path)
    assert told == ["reset", "step"]
