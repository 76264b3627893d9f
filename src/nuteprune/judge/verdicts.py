"""What `eval` found: as tables for people and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nuteprune.console import Output
from nuteprune.judge.perplexity import PROTOCOL, mean
from nuteprune.judge.protocols import HELD_OUT
from nuteprune.judge.retention import retentions
from nuteprune.judge.tasks import Score, Tasks
from nuteprune.judge.texts import Blocks

Retention = dict[str, float | None]
LABELS = ("model", "dense")
"""What tables call MODEL and the one after --against."""


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
    retention: dict[str, Retention] = dataclasses.field(default_factory=dict)

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
        names = list(self.perplexity or self.tasks)
        for label, name in zip(LABELS, names, strict=False):
            step = f", midway: masks at {self.midway[name]:.2%}" if name in self.midway else ""
            output.line(f"{label}: {name}{step}")
        if self.perplexity:
            self._print_perplexity(output)
        if self.tasks:
            self._print_tasks(output)

    def _print_perplexity(self, output: Output) -> None:
        found = list(self.perplexity.values())
        rows = [[text, *(f"{x[text]:.2f}" for x in found)] for text in self.blocks]
        rows.append(["mean", *(f"{mean(x):.2f}" for x in found)])
        columns = ["text", *LABELS[: len(found)]]
        output.line()
        self._table(output, "Perplexity, lower is better", "perplexity", columns, rows)
        for name, blocks in self.blocks.items():
            output.line(f"{name}: {_stated(blocks.described)}")

    def _print_tasks(self, output: Output) -> None:
        found = list(self.tasks.values())
        rows = []
        for task, score in found[0].items():
            error = "-" if score.stderr is None else f"±{score.stderr:.4f}"
            count = "-" if score.samples is None else str(score.samples)
            values = [f"{x[task].value:.4f}" for x in found]
            rows.append([task, score.metric, count, error, *values])
        if len({(x.metric.startswith("acc"), x.higher_is_better) for x in found[0].values()}) == 1:
            means = (mean({task: x.value for task, x in scores.items()}) for scores in found)
            rows.append(["mean", "", "", "", *(f"{x:.4f}" for x in means)])
        columns = ["task", "metric", "questions", "std error", *LABELS[: len(found)]]
        output.line()
        self._table(output, "Zero-shot tasks", "tasks", columns, rows)

    def _table(
        self, output: Output, title: str, what: str, columns: list[str], rows: list[list[str]]
    ) -> None:
        """Print a table, with what is retained as its last column if that is known."""
        kept = self.retention.get(what)
        if kept is not None:
            columns = [*columns, "retained"]
            rows = [[*row, _percent(kept.get(row[0]))] for row in rows]
        output.table(title, columns, rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _stated(how: Mapping[str, Any]) -> str:
    part = "held-out part" if how["part"] == HELD_OUT else "all"
    overlap = "" if how["stride"] == how["block_length"] else f", one every {how['stride']}"
    return (
        f"{part}, {how['block_count']} blocks of {how['block_length']} tokens{overlap}, documents "
        f"joined by {how['joining'].replace('-', ' ')}; protocol {how['protocol']}"
    )
