"""`nuteprune eval`: how good a checkpoint is, dense, pruned or midway."""

from __future__ import annotations

from typing import Any

from nuteprune.cli import options as o
from nuteprune.jobs.options import Evaluation


@o.with_options(Evaluation, defaults=True)
def evaluate(model: o.Model, as_json: o.Json = False, **given: Any) -> None:
    """Measure how good MODEL is: perplexity, copying, answers, tasks.

    Perplexity is measured on text, copying on random tokens. With --against also whether greedy
    answers loop, and what is lost on tokens that need their context. Tasks are zero-shot unless
    --fewshot says otherwise. MODEL may also be a trainer checkpoint, OUT/run/checkpoint-N. Without
    --data, --protocol and --tasks the text is the held-out part of the demo's.
    """
    asked = Evaluation(model, **o.given(given))
    from nuteprune.console import Output
    from nuteprune.jobs.evaluate import run

    output = Output(as_json)
    output.result(run(asked, output))
