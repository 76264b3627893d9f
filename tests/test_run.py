"""The main job by its stages: killed behind any of them, and for several targets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.lora import LoraLayer

import nuteprune
from nuteprune import run
from nuteprune.products import Products
from nuteprune.run import Run
from nuteprune.run_folder import RECORD
from tests.undrawn import leave_blank

pytestmark = pytest.mark.slow(2)

STAGES = ("judge", "score", "choose", "refit")
"""Those whose product a run goes on with, in their order."""


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def pictures_are_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_blank(monkeypatch.setattr)


@pytest.fixture(scope="module")
def inputs(
    tiny_model, tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    model, text = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("text") / "text.txt"
    tiny_model("llama", vocab_size=300, num_hidden_layers=2).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    text.write_text("\n\n\n".join(f"Teacher {i} teaches student {i}. " * 4 for i in range(60)))
    return model, text


def prune(inputs: tuple[Path, Path], out: Path, **more: Any) -> dict[str, Any]:
    model, text = inputs
    settings: dict[str, Any] = {
        **{"sparsity": 0.3, "steps": 2, "length": 16, "device": "cpu", "dtype": "float32"},
        **{"calibration_blocks": 2, "eval_blocks": 2, "neuron_multiple": 4, "lora_rank": 2},
        **{"save_steps": 1, "per_device_train_batch_size": 2, "shares": 1},
    }
    record = nuteprune.prune(str(model), data=str(text), out=out, **settings | more)
    assert record is not None
    return record


def bytes_of(out: Path, model: str = "", run: str = "run") -> tuple[bytes, list[Any]]:
    """What must not depend on what a run went through."""
    lines = (out / run / "metrics.jsonl").read_text().splitlines()
    return (out / model / "model.safetensors").read_bytes(), [json.loads(x)["loss"] for x in lines]


@pytest.fixture(scope="module")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        leave_blank(patch.setattr)
        prune(inputs, out := tmp_path_factory.mktemp("whole") / "out", quiet=True)
    return out


def kill_after(patch: pytest.MonkeyPatch, stage: str) -> None:
    """Let a run die when a stage is done, and its product written."""
    for name in ("keep", "keep_json"):
        original = getattr(Products, name)

        def kept(
            self: Products, done: str, *args: Any, _original: Any = original, **how: Any
        ) -> Any:
            found = _original(self, done, *args, **how)
            if done == stage:
                raise Killed
            return found

        patch.setattr(Products, name, kept)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that are gone through."""
    stages: list[str] = []
    measured = Products.measured

    @contextmanager
    def watched(self: Products, stage: str) -> Iterator[None]:
        stages.append(stage)
        with measured(self, stage):
            yield

    monkeypatch.setattr(Products, "measured", watched)
    return stages


def test_the_dense_model_is_judged_without_adapters(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[list[bool]] = []
    original = run.judge

    def judge(model: Any, *args: Any, **more: Any) -> Any:
        judged.append([x.disable_adapters for x in model.modules() if isinstance(x, LoraLayer)])
        return original(model, *args, **more)

    monkeypatch.setattr(run, "judge", judge)
    prune(inputs, tmp_path / "out", steps=0, quiet=True)
    dense, small = judged
    assert dense
    assert all(dense)
    assert not small  # adapters are merged


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_behind_a_stage_goes_on_with_the_next(
    stage: str,
    inputs: tuple[Path, Path],
    whole: Path,
    begun: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_after(patch, stage)
        with pytest.raises(Killed):
            prune(inputs, out)
    count = STAGES.index(stage) + 1
    assert tuple(begun) == STAGES[:count]
    begun.clear()
    capsys.readouterr()
    record = prune(inputs, out, resume=True)
    assert tuple(begun) == (*STAGES[count:], "teach", "slice", "judge")
    assert f"Resumed {', '.join(STAGES[:count])}: done before" in capsys.readouterr().out
    assert bytes_of(out) == bytes_of(whole)
    assert list(record["stages"]) == [*STAGES, "teach", "slice"]


def test_a_run_that_is_done_is_cut_and_judged_anew(
    inputs: tuple[Path, Path], whole: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(whole)
    (whole / "run" / "score.safetensors").write_bytes(b"damaged")
    prune(inputs, whole, resume=True, quiet=True)
    assert begun == ["score", "teach", "slice", "judge"]
    assert bytes_of(whole) == before


PLAIN: dict[str, Any] = {"method": "fisher", "quiet": True}
"""Scores that depend on no target, up to 30 %, as those of the default do."""


RAMP: dict[str, Any] = {"progressive": True, "steps": 6}


@pytest.mark.parametrize("settings", [{}, RAMP], ids=["fixed", "ramp"])
def test_each_target_has_the_model_of_a_run_of_its_own(
    settings: dict[str, Any],
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LoRA begins anew, and the dense model is whole again; also where it was killed between."""
    targets = (0.15, 0.3)
    prune(inputs, tmp_path / "both", sparsity=targets, **PLAIN, **settings)
    original = Run.teach

    def teach(self: Run, target: Any, *given: Any) -> Any:
        found = original(self, target, *given)
        if target is self.targets[1]:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Run, "teach", teach)
        with pytest.raises(Killed):
            prune(inputs, tmp_path / "killed", sparsity=targets, **PLAIN, **settings)
    prune(inputs, tmp_path / "killed", sparsity=targets, resume=True, **PLAIN, **settings)
    for target in targets:
        alone = tmp_path / f"alone-{target}"
        record = prune(inputs, alone, sparsity=target, **PLAIN, **settings)
        assert (alone / "run" / "score.safetensors").is_file()
        assert record["stages"]["score"]["cpu_seconds"] >= 0
        folder = f"sparsity-{target}"
        for name in ("both", "killed"):
            assert bytes_of(tmp_path / name, folder, f"{folder}/run") == bytes_of(alone)
        kept = json.loads((tmp_path / "both" / folder / RECORD).read_text())
        for key in ("sparsity", "target", "layers", "params", "perplexity", "teachers"):
            assert kept[key] == record[key]


def test_several_targets_share_scores_and_the_dense_models_figures(
    inputs: tuple[Path, Path], begun: list[str], tmp_path: Path
) -> None:
    result = prune(inputs, tmp_path / "out", sparsity=(0.15, 0.3), steps=0, quiet=True)
    assert begun == [
        *("judge", "score"),
        *("choose", "refit", "teach", "slice", "judge"),
        *("choose", "refit", "teach", "slice", "judge"),
    ]
    assert [x["target"] for x in result["targets"]] == [0.15, 0.3]
    small, smaller = (x["params"]["after"] for x in result["targets"])
    assert small > smaller
