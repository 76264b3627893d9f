"""What `eval` says of figures, and what it says nothing of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nuteprune.console import Output
from nuteprune.jobs.verdicts import Verdicts
from nuteprune.judge.context import Copying
from nuteprune.judge.published_blocks import Blocks
from nuteprune.judge.tasks import Score
from tests.export.test_card import BESIDE


def copied(percent: float, **changes: Any) -> Copying:
    how = {"sequences": 32, "length": 100, "tokens": 3200, "highest_id": 9000, "seed": 1}
    return Copying(percent, how | changes)


def test_copies_of_other_sequences_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    for changes in ({}, {"highest_id": 8000}, {"length": 50, "tokens": 1600}):
        both = {"small": copied(30.0), "large": copied(60.0, **changes)}
        verdicts = Verdicts({}, None, copying=both)
        verdicts.compare("small", "large")
        verdicts.print(Output())
        told = capsys.readouterr().out
        kept = verdicts.to_dict()["retention"]
        assert kept == ({} if changes else {"copying": {"repeat": 50.0}})
        assert ("50.0 %" in told) == (not changes)
        assert ("copied other sequences" in told) == bool(changes)


def test_answers_and_context_are_told_with_what_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sample = {"which": "worst", "prompt": "Why?", "dense": "So.", "pruned": "So\nso so"}
    verdicts = Verdicts({}, None, beside={**BESIDE, "samples": [sample]})
    verdicts.print(Output())
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for expected in (
        "looping, % 3.1 17.2",
        "nats lost, 12 tokens that need it 1.25",
        "kl: how far.",
        "kept: how much.",
        "The worst answer, by repeats: Why?",
        "pruned: So so so",
    ):
        assert expected in said
    found = verdicts.to_dict()
    assert {key: found[key] for key in BESIDE} == BESIDE
    assert found["samples"] == [sample]
    assert not {"answers", "context", "samples"} & Verdicts({}, None).to_dict().keys()


def test_unlike_metrics_have_a_mean_neither_in_the_table_nor_in_the_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = {"a": Score(0.5, None, True, "acc", 4), "b": Score(30.0, None, True, "f1", 4)}
    verdicts = Verdicts({}, None, tasks={"small": scores, "large": scores})
    verdicts.compare("small", "large")
    verdicts.print(Output())
    assert "mean" not in capsys.readouterr().out
    found = verdicts.to_dict()
    assert found["retention"]["tasks"] == {"a": 100.0, "b": 100.0}
    assert found["retention_stderr"]["tasks"].keys() == {"a", "b"}


def test_examples_other_than_those_asked_for_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    class Questions:
        def described(self) -> dict[str, Any]:
            return {"fewshot": 5}

    scores = {
        name: Score(0.5, None, True, "acc", 4, fewshot=count)
        for name, count in {"own": 0, "asked": 5, "group": None}.items()
    }
    verdicts = Verdicts({}, Questions(), tasks={"small": scores})  # type: ignore[arg-type]
    verdicts.print(Output())
    assert "whatever --fewshot is: own 0\n" in capsys.readouterr().out
    told = verdicts.to_dict()["tasks"]["small"]
    assert {name: x["fewshot"] for name, x in told.items()} == {"own": 0, "asked": 5, "group": None}


@pytest.mark.parametrize(("stride", "said"), [(8, "all tokens of a block"), (4, "predicted once")])
def test_the_measure_is_that_of_the_blocks(stride: int, said: str) -> None:
    how = {"stride": stride, "block_length": 8}
    blocks = Blocks(torch.zeros(2, 8, dtype=torch.long), torch.ones(2, dtype=torch.long), how)
    assert said in Verdicts({"text": blocks}, None).to_dict()["protocol"]["measure"]
