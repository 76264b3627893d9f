"""Each stage before the first step leaves the model as it found it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune.stages.choose import choose
from nuteprune.stages.judge import judge
from nuteprune.stages.refit import refit
from nuteprune.stages.score import score
from nuteprune.stages.write import write
from nuteprune.train.prepare import prepare

from .conftest import TEXT, settings

HELD_OUT = {"text": TEXT[30:32]}


def chosen(prepared: Any) -> Any:
    return choose(prepared, prepared.allocator.chance_scores(), 0.5)


def written(prepared: Any, tokenizer: Any, folder: Path) -> None:
    write(prepared.anatomy.model, tokenizer, tokens=40, length=16, seed=3, folder=folder)


STAGES: dict[str, Callable[[Any, Any, Path], Any]] = {
    "write": written,
    "judge": lambda x, tokenizer, _: judge(x.anatomy.model, HELD_OUT, tokenizer),
    "score": lambda x, *_: score(x, TEXT[:4], target=0.5, refit_blocks=TEXT[:18]),
    "choose": lambda x, *_: chosen(x),
    "refit": lambda x, *_: refit(x, chosen(x), TEXT[:18]),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_the_model_as_it_found_it(
    stage: str, tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    prepared = prepare(tiny_model("llama", vocab_size=300), settings(tmp_path))
    model = prepared.model
    parameters = dict(model.named_parameters())
    before = {name: x.detach().clone() for name, x in parameters.items()}
    trained = {name for name, x in parameters.items() if x.requires_grad}

    def hooks() -> list[tuple[int, int]]:
        return [(len(x._forward_hooks), len(x._forward_pre_hooks)) for x in model.modules()]

    modes, hooked = [x.training for x in model.modules()], hooks()
    STAGES[stage](prepared, tiny_tokenizer, tmp_path / "run")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameters[name] for name in after)  # an optimizer may hold them
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert {name for name, x in after.items() if x.requires_grad} == trained
    assert all(x.grad is None for x in after.values())
    assert [x.training for x in model.modules()] == modes
    assert hooks() == hooked
    assert prepared.hooks.masks is None
    assert not prepared.bank.weights()
