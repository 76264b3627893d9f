"""What `eval` found: as tables for people and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nuteprune.cli.output import Output
from nuteprune.judge.perplexity import PROTOCOL, mean
from nuteprune.judge.retention import retentions
from nuteprune.judge.tasks import Score, Tasks
from nuteprune.judge.texts import HELD_OUT, Blocks

Kept = dict[str, float | None]


@dataclasses.dataclass
class Verdicts:
    """Figures of one or two models.

    Args:
        blocks: text -> what perplexity is measured on; may be empty.
        questions: the tasks that were asked, None for none.
        perplexity: model -> text -> perplexity.
        tasks: model -> task -> score.
        midway: model -> sparsity of its masks, of models in the middle of a run.
        retention: `perplexity` and `tasks` -> text or task -> percent; see `compare`.
    """

    blocks: Mapping[str, Blocks]
    questions: Tasks | None
    perplexity: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    tasks: dict[str, dict[str, Score]] = dataclasses.field(default_factory=dict)
    midway: dict[str, float] = dataclasses.field(default_factory=dict)
    retention: dict[str, Kept] = dataclasses.field(default_factory=dict)

    def compare(self, model: str, dense: str) -> None:
        """Add what the model retains of the dense one."""
        if self.perplexity:
            ours, theirs = self.perplexity[model], self.perplexity[dense]
            self.retention["perplexity"] = retentions(ours, theirs, dict.fromkeys(ours, False))
        if self.tasks:
            mine, of_dense = self.tasks[model], self.tasks[dense]
            self.retention["tasks"] = retentions(
                {task: score.value for task, score in mine.items()},
                {task: score.value for task, score in of_dense.items()},
                {task: score.higher_is_better for task, score in mine.items()},
            )

    def to_dict(self) -> dict[str, Any]:
        """Return everything, fit for JSON."""
        protocol: dict[str, Any] = {}
        if self.blocks:
            stated = {name: dict(blocks.described) for name, blocks in self.blocks.items()}
            protocol = {**{k: PROTOCOL[k] for k in ("measure", "mean")}, "texts": stated}
        return {
            "perplexity": self.perplexity,
            "protocol": protocol,
            "tasks": {
                name: {task: dataclasses.asdict(score) for task, score in scores.items()}
                for name, scores in self.tasks.items()
            },
            "tasks_protocol": None if self.questions is None else self.questions.described(),
            "retention": self.retention,
            "midway_sparsity": self.midway,
        }

    def print(self, output: Output) -> None:
        """Print tables, each with how its figures came about."""
        for name, sparsity in self.midway.items():
            output.line(f"{name}: in the middle of its run, masks at a sparsity of {sparsity:.2%}")
        if self.perplexity:
            self._print_perplexity(output)
        if self.tasks:
            self._print_tasks(output)

    def _print_perplexity(self, output: Output) -> None:
        rows = [
            [name, *(f"{x:.2f}" for x in found.values()), f"{mean(found):.2f}"]
            for name, found in self.perplexity.items()
        ]
        rows += _percent_row(self.retention.get("perplexity"))
        output.table("Perplexity (lower is better)", ["", *self.blocks, "mean"], rows)
        for name, blocks in self.blocks.items():
            output.line(f"{name}: {_stated(blocks.described)}")

    def _print_tasks(self, output: Output) -> None:
        scores = next(iter(self.tasks.values()))
        rows = [
            [name, *(f"{x.value:.4f}" for x in found.values()), f"{_average(found):.4f}"]
            for name, found in self.tasks.items()
        ]
        rows += _percent_row(self.retention.get("tasks"))
        columns = [f"{task} ({score.metric})" for task, score in scores.items()]
        output.table("Tasks", ["", *columns, "mean"], rows)
        for task, score in scores.items():
            error = "" if score.stderr is None else f", standard error {score.stderr:.4f}"
            count = "" if score.samples is None else f" of {score.samples} questions"
            output.line(f"{task}: {score.metric}{count}{error}")


def _percent_row(kept: Kept | None) -> list[list[str]]:
    if kept is None:
        return []
    return [["retained", *("-" if x is None else f"{x:.1f} %" for x in kept.values())]]


def _average(scores: Mapping[str, Score]) -> float:
    return mean({task: score.value for task, score in scores.items()})


def _stated(how: Mapping[str, Any]) -> str:
    part = "held-out part" if how["part"] == HELD_OUT else "all"
    overlap = "" if how["stride"] == how["block_length"] else f", one every {how['stride']}"
    return (
        f"{part}, {how['block_count']} blocks of {how['block_length']} tokens{overlap}, documents "
        f"joined by {how['joining'].replace('-', ' ')}; protocol {how['protocol']}"
    )
