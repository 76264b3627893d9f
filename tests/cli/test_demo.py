"""What `nuteprune demo` makes of its options, and which folder it takes; the run itself is in
test_end_to_end.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nuteprune.cli import commands
from nuteprune.errors import UserError
from nuteprune.files import write_sums
from nuteprune.jobs.demo import MEMORY, MINUTES, with_defaults
from nuteprune.jobs.guard import check_out
from nuteprune.jobs.job import PruneJob
from nuteprune.run_folder import RUN, SELF_WRITTEN


@pytest.fixture
def asked(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Calls the command; returns the job that it would do."""
    jobs: list[PruneJob] = []
    monkeypatch.setattr(
        "nuteprune.jobs.demo.run_and_report", lambda job, _: jobs.append(with_defaults(job))
    )
    monkeypatch.setattr(commands, "check_free", lambda _: None)
    monkeypatch.chdir(tmp_path)

    def call(*args: Any) -> PruneJob:
        code, _, stderr = run("demo", *args)
        assert code == 0, stderr
        return jobs[-1]

    return call


def test_options_win_over_files_and_files_over_what_the_demo_does(
    asked: Any, tmp_path: Path
) -> None:
    plain = asked()
    assert (plain.settings["target_sparsity"], plain.minutes) == (0.2, 5)
    assert "max_steps" not in plain.settings
    assert plain.settings["gradient_accumulation_steps"] == 2
    (tmp_path / "a.yaml").write_text("sparsity: 0.3\nsteps: 200\nbatch_size: 3\n")
    job = asked("--config", "a.yaml")
    assert (job.settings["target_sparsity"], job.settings["max_steps"]) == (0.3, 200)
    assert job.minutes is None
    assert "gradient_accumulation_steps" not in job.settings
    job = asked("--config", "a.yaml", "--steps", 5, "--set", "target_sparsity=0.4")
    assert (job.settings["target_sparsity"], job.settings["max_steps"]) == (0.4, 5)
    (tmp_path / "shape.yaml").write_text("neurons: 512\n")
    assert "target_sparsity" not in asked("--shape", "shape.yaml").settings


def test_help_states_the_defaults_of_the_demo(run: Any) -> None:
    said = " ".join(run("demo", "--help")[1].split())
    assert f"demo: what --minutes {MINUTES} has time for)" in said
    parts = MEMORY["gradient_accumulation_steps"]
    size = MEMORY["per_device_train_batch_size"]
    assert f"demo {size}, with {parts} accumulated)" in said


def checkpoint(folder: Path) -> None:
    place = folder / RUN / "checkpoint-50"
    place.mkdir(parents=True)
    (place / "state").write_text("")
    (place / "SHA256SUMS").write_text("0  state\n")


def test_resume_goes_on_with_the_newest_folder_that_was_begun(asked: Any, tmp_path: Path) -> None:
    assert asked("--resume").out == Path("nuteprune-demo")
    checkpoint(tmp_path / "nuteprune-demo")
    assert asked().out == Path("nuteprune-demo-2")
    assert asked("--overwrite").out == Path("nuteprune-demo")
    assert asked("--resume").out == Path("nuteprune-demo")
    checkpoint(tmp_path / "nuteprune-demo-2")
    (tmp_path / "nuteprune-demo-3").mkdir()
    assert asked("--resume").out == Path("nuteprune-demo-2")
    written = tmp_path / "nuteprune-demo-3" / RUN / SELF_WRITTEN  # stopped while the model wrote
    written.parent.mkdir()
    written.write_text("{}")
    assert asked("--resume").out == Path("nuteprune-demo-3")
    checkpoint(tmp_path / "demo")  # a folder of that name is not the model and text
    job = asked("--out", "demo", "--resume")
    check_out(job)


def test_what_a_run_has_not_written_is_not_removed_by_its_end(asked: Any, tmp_path: Path) -> None:
    checkpoint(tmp_path / "out")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "out" / name).write_text("")
    write_sums(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("the card")
    (tmp_path / "out" / "sparsity-0.1").mkdir()
    check_out(asked("--out", "out", "--resume"))
    (tmp_path / "out" / "model.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"holds model\.gguf"):
        check_out(asked("--out", "out", "--resume"))
    check_out(asked("--out", "out", "--resume", "--overwrite"))


def test_a_target_given_wins_over_shape_and_targets_of_a_file(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("shape: {neurons: 32}\nsparsity: [0.1, 0.2]\n")
    settings = asked("--config", "a.yaml", "--sparsity", 0.5).settings
    assert settings["target_sparsity"] == "0.5"
    assert "shape" not in settings
