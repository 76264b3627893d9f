"""What a job is asked: options, YAML, --set and keywords come to the same, declared once."""

from __future__ import annotations

import dataclasses
import keyword
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nuteprune
from nuteprune.data.specs import DEMO
from nuteprune.errors import UserError
from nuteprune.export.gguf.write import FILE_TYPES
from nuteprune.gates.importance import METHODS
from nuteprune.jobs.fewer_tokens import MOST_COST
from nuteprune.jobs.job import PruneJob, RecoverJob, VocabJob, what_it_is
from nuteprune.jobs.options import TYPES, Evaluation
from nuteprune.jobs.prune_run import mixture, recorded
from nuteprune.jobs.read_settings import make_job
from nuteprune.judge.answers import TOKENS
from nuteprune.progressive.config import GATE_TYPES, OBJECTIVES
from nuteprune.progressive.settings import ProgressiveSettings
from nuteprune.run_folder import SELF
from nuteprune.train.config import REFIT_BLOCKS, NutePruneConfig
from nuteprune.train.declared import declared
from nuteprune.train.settings import PruneSettings

OUT: dict[str, Any] = {"model": "m", "out": "o"}


def job(given: dict[str, Any], **more: Any) -> PruneJob:
    return make_job(PruneJob, {**OUT, **given}, **more)


def test_words_full_names_files_and_assignments_come_to_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("sparsity: 0.3\nsteps: 7\nlength: 64\nlearning_rate: 1e-3\n")
    asked = {"target_sparsity": 0.3, "max_steps": 7, "length": 64, "learning_rate": 1e-3}
    short = {"sparsity": 0.3, "steps": 7, "length": 64, "learning_rate": 1e-3}
    from_set = [f"{key}={value}" for key, value in asked.items()]
    jobs = [job(asked), job(short), job({}, config=path), job({}, assignments=from_set)]
    assert all(x == jobs[0] for x in jobs)
    assert jobs[0].settings == {"target_sparsity": 0.3, "max_steps": 7, "learning_rate": 1e-3}
    assert jobs[0].out == Path("o")
    later = job({"steps": 9}, config=path, assignments=["steps=8", "length=32"])
    assert (later.settings["max_steps"], later.length) == (9, 32)
    with pytest.raises(UserError, match="max_steps is given twice"):
        job({"steps": 9, "max_steps": 9})


def test_values_of_python_and_of_yaml_are_those_of_options(tmp_path: Path) -> None:
    """NumPy's numbers, tuples and paths; what begins like a number and is none."""
    given = {"sparsity": (0.2, 0.3), "data": (Path("a.txt"), "b.txt"), "steps": np.int64(8)}
    numbers = {"learning_rate": np.float64(1e-3), "seed": np.int64(3)}
    made = job({**given, **numbers})
    assert made.specs == ["a.txt", "b.txt"]
    expected = {"target_sparsity": [0.2, 0.3], "max_steps": 8, "learning_rate": 1e-3, "seed": 3}
    assert made.settings == expected
    assert {type(made.settings[x]) for x in ("max_steps", "seed")} == {int}
    path = tmp_path / "a.yaml"
    path.write_text("sparsity: 1e-1,2e-1\ndata: 9e107d9d37.jsonl\nlearning_rate: 1e-3\n")
    of_file = job({}, config=path)
    assert of_file.settings == {"target_sparsity": "1e-1,2e-1", "learning_rate": 1e-3}
    assert of_file.specs == ["9e107d9d37.jsonl"]
    assert job({}, assignments=["data=[2024, x]"]).specs == ["2024", "x"]
    with pytest.raises(UserError, match="data names no text"):
        job({}, assignments=["data=[]"])


def test_an_assignment_says_anew_how_much_is_to_go(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("sparsity: 0.3\nsteps: 7\n")
    made = job({}, config=path, assignments=["params=100M"])
    assert made.settings == {"target_params": "100M", "max_steps": 7}
    with pytest.raises(UserError, match="both say how much"):
        job({}, assignments=["params=100M", "sparsity=0.3"])


def test_what_a_call_does_is_no_matter_for_a_file(tmp_path: Path) -> None:
    assert job({"dry_run": True}).dry_run
    with pytest.raises(UserError, match="unknown setting 'dry_run'"):
        job({}, assignments=["dry_run=true"])


@pytest.mark.parametrize("kind", [PruneJob, RecoverJob, VocabJob, ProgressiveSettings])
def test_every_setting_of_ours_says_what_it_is(kind: type) -> None:
    inner = {"settings", "files", "started", "after", "may_exceed"}
    own = {x.name for x in dataclasses.fields(kind)} - inner
    found = declared(kind)
    assert own == found.keys()
    assert all(x.help for x in found.values())
    options = [x.option for x in found.values() if x.option]
    assert len(options) == len(set(options))


OPTIONS = """
sparsity params active-params size memory speedup costs shape gates shapes method
offload steps batch-size gradient-checkpointing out data eval-data text-column length
device dtype resume overwrite trust-remote-code shares own-text family bits vocab minutes
dry-run
"""
WITHOUT_OPTION = """
neuron_multiple hidden_multiple for_quantization calibration_blocks text_blocks teacher
progressive unlikelihood lora_rank refit sharded
gradient_accumulation_steps learning_rate seed eval_blocks text_only
"""


def test_the_settings_of_a_prune_job_are_few() -> None:
    """A new one is a decision; beside these, transformers' own are settings."""
    found = [x for kind in (PruneSettings, PruneJob) for x in declared(kind).values()]
    assert [x.option for x in found if x.option] == [f"--{x}" for x in OPTIONS.split()]
    rest = [x.name for x in found if not x.option]
    assert rest == [*WITHOUT_OPTION.split()[:-2], "model", *WITHOUT_OPTION.split()[-2:]]


def test_names_that_help_tells_are_those_of_what_does_the_work() -> None:
    """Help may not load what does it."""
    ours = declared(ProgressiveSettings)
    assert ours["method"].choices == tuple(METHODS)
    paper = declared(ProgressiveSettings)
    assert paper["gate_type"].choices == tuple(GATE_TYPES)
    assert paper["objective"].choices == tuple(OBJECTIVES)
    assert TYPES["gguf"] == tuple(FILE_TYPES)
    for kind, name, number in (
        (PruneSettings, "calibration_blocks", f" {REFIT_BLOCKS:g} times"),
        (Evaluation, "answer_tokens", f"default {TOKENS})"),
        (PruneJob, "vocab", f" {100 * MOST_COST:g} %"),
    ):
        assert number in declared(kind)[name].help


@pytest.mark.parametrize("word", ["for", "sed", "stepz", "lenght"])
def test_what_python_is_told_of_a_setting_is_a_name_of_python(word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"unknown setting '{word}'") as error:
        nuteprune.prune(str(tmp_path), out=tmp_path / "out", sparsity=0.2, **{word: 1})
    _, _, near = str(error.value).partition("did you mean ")
    assert not near or (near[:-1].isidentifier() and not keyword.iskeyword(near[:-1]))


@pytest.mark.parametrize(
    ("given", "specs", "shares"),
    [
        ({}, [DEMO, SELF], [0.5, 0.5]),
        ({"data": "a.txt"}, ["a.txt", SELF], [0.5, 0.5]),
        ({"data": ["a.txt", "b.txt"]}, ["a.txt", "b.txt", SELF], [0.25, 0.25, 0.5]),
        ({"data": SELF}, [SELF], [1.0]),
        ({"data": ["a.txt", SELF]}, ["a.txt", SELF], [1.0, 1.0]),
        ({"data": "a.txt", "shares": "1"}, ["a.txt"], [1.0]),
        ({"data": ["a.txt", SELF], "shares": "0.7,0.3"}, ["a.txt", SELF], [0.7, 0.3]),
    ],
)
def test_the_model_s_own_text_is_half_where_nothing_else_is_said(
    given: dict[str, Any], specs: list[str], shares: list[float]
) -> None:
    assert mixture(job(given)) == (specs, shares)


def test_text_that_is_given_has_the_share_of_what_the_model_would_write() -> None:
    with pytest.raises(UserError, match="one number for each --data"):
        mixture(job({"shares": "many"}))
    written = job({"own_text": "own.jsonl"})
    assert mixture(written) == mixture(job({}))
    told = job({"data": ["a.txt", SELF], "shares": [3, 1], "own_text": "own.jsonl"})
    assert mixture(told) == (["a.txt", SELF], [3.0, 1.0])


def test_what_a_run_is_does_not_hang_on_the_spelling(tmp_path: Path, monkeypatch: Any) -> None:
    """A run that was begun from one folder, by options, goes on from another, by keywords."""
    files = {"family": "mine.yaml", "own_text": "own.jsonl"}
    for name in files.values():
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    told = what_it_is(job({"shares": "0.5, .25", **files}))
    whole = {key: str(tmp_path / name) for key, name in files.items()}
    assert told.items() >= {"shares": [0.5, 0.25], **whole}.items()
    monkeypatch.chdir("/")
    assert what_it_is(job({"shares": [0.5, 0.25], **whole})) == told
    assert not {"shares", *files} & what_it_is(job({})).keys()


@pytest.mark.parametrize("kind", [PruneJob, RecoverJob])
def test_what_a_model_writes_does_not_judge(kind: Any) -> None:
    with pytest.raises(UserError, match=r"^self is text that .*pass other text here"):
        make_job(kind, {**OUT, "eval_data": SELF})
    assert make_job(kind, {**OUT, "eval_data": f"./{SELF}"}).eval_data == f"./{SELF}"


def test_a_run_of_several_processes_is_made_again_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True, gradient_accumulation_steps=2)
    assert recorded(job({}), args)["gradient_accumulation_steps"] == 2
    monkeypatch.setattr(NutePruneConfig, "world_size", 4)
    assert recorded(job({}), args)["gradient_accumulation_steps"] == 8
