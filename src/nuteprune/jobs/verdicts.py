"""What `eval` found: as tables for people and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from nuteprune.console import Output
from nuteprune.data.fingerprint import IN_DOMAIN, NOT_KNOWN, OTHER_TEXT
from nuteprune.export.card import definitions
from nuteprune.jobs.show import print_beside
from nuteprune.judge.context import Copying
from nuteprune.judge.perplexity import OVERLAPPING, PROTOCOL, mean
from nuteprune.judge.published import HELD_OUT
from nuteprune.judge.published_blocks import Blocks
from nuteprune.judge.retention import retention, retention_stderr, retentions
from nuteprune.judge.tasks import Figure, Flips, Score, Tasks, answers_of, flips

Retention = dict[str, float | None]
LABELS = ("model", "dense")
"""What tables call MODEL and the one after --against."""
MEAN: Final = "mean"

_TITLES: Final[Mapping[str | None, str]] = {
    IN_DOMAIN: "In-domain text (of sources that the model was calibrated on)",
    OTHER_TEXT: "Other text (of sources that the model was not calibrated on)",
    NOT_KNOWN: "Text of which no record tells whether the model was calibrated on its source",
    None: "Text",
}


@dataclasses.dataclass
class Verdicts:
    """Figures of one or two models.

    Args:
        blocks: text -> what perplexity is measured on; may be empty.
        questions: the tasks that were asked, None for none.
        perplexity: model -> text -> perplexity.
        copying: model -> how well it copies from its context, where that can be measured.
        tasks: model -> task -> score.
        retention: `perplexity`, `copying` and `tasks` -> text or task -> percent; see `compare`.
        flips: task -> questions that one model has right and the other wrong; see `compare`.
        beside: what `judge_beside` says of the first model; empty: not judged.
        retention_stderr: `tasks` -> task -> standard error of that, in percentage points.
    """

    blocks: Mapping[str, Blocks]
    questions: Tasks | None
    perplexity: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    copying: dict[str, Copying] = dataclasses.field(default_factory=dict)
    tasks: dict[str, dict[str, Score]] = dataclasses.field(default_factory=dict)
    flips: dict[str, Flips] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    retention: dict[str, Retention] = dataclasses.field(default_factory=dict)
    retention_stderr: dict[str, Retention] = dataclasses.field(default_factory=dict)

    def compare(self, model: str, dense: str) -> None:
        """Add what the model retains of the dense one."""
        if self.perplexity:
            ours, theirs = self.perplexity[model], self.perplexity[dense]
            self.retention["perplexity"] = retentions(ours, theirs)
        copied = [self.copying[name] for name in (model, dense) if name in self.copying]
        if len(copied) == 2 and _alike(copied):
            shares = (x.percent for x in copied)
            self.retention["copying"] = {"repeat": retention(*shares, higher_is_better=True)}
        if self.tasks:
            mine, of_dense = self.tasks[model], self.tasks[dense]
            pairs = {task: (score, of_dense[task]) for task, score in mine.items()}
            kept = {task: _retained(*pair) for task, pair in pairs.items()}
            errors = {task: _error([pair]) for task, pair in pairs.items()}
            if (average := _mean_of(mine)) and (dense_average := _mean_of(of_dense)):
                kept[MEAN] = _retained(average, dense_average)
                errors[MEAN] = _error(pairs.values())
            self.retention["tasks"], self.retention_stderr["tasks"] = kept, errors
            counted = {task: flips(*pair) for task, pair in pairs.items()}
            self.flips = {task: found for task, found in counted.items() if found is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return everything, fit for JSON."""
        protocol: dict[str, Any] = {}
        if self.blocks:
            stated = {name: dict(blocks.described) for name, blocks in self.blocks.items()}
            overlap = any(_overlaps(how) for how in stated.values())
            measure = OVERLAPPING if overlap else PROTOCOL["measure"]
            protocol = {"measure": measure, "mean": PROTOCOL["mean"], "texts": stated}
        return {
            "perplexity": self.perplexity,
            "protocol": protocol,
            "copying": {name: found.percent for name, found in self.copying.items()},
            "copying_protocol": {name: found.protocol for name, found in self.copying.items()},
            "tasks": {
                name: {task: score.to_dict() for task, score in scores.items()}
                for name, scores in self.tasks.items()
            },
            "tasks_protocol": None if self.questions is None else self.questions.described(),
            "retention": self.retention,
            "retention_stderr": self.retention_stderr,
            "flips": {task: found._asdict() for task, found in self.flips.items()},
            **self.beside,
        }

    def print(self, output: Output) -> None:
        """Print tables, each with how its figures came about."""
        names = list(self.perplexity or self.tasks or self.copying)
        for label, name in zip(LABELS, names, strict=False):
            output.line(f"{label}: {name}")
        for kind, title in _TITLES.items():
            texts = [name for name, x in self.blocks.items() if x.described.get("kind") == kind]
            if texts and self.perplexity:
                self._print_perplexity(output, title, texts)
        if self.copying and self.copying.keys() == set(names):
            self._print_copying(output)
        print_beside(self.beside, self.beside.get("samples", []), output)
        for said in definitions(self.beside):
            output.line(said)
        if self.tasks:
            self._print_tasks(output)

    def _print_perplexity(self, output: Output, title: str, texts: Sequence[str]) -> None:
        found = [{text: x[text] for text in texts} for x in self.perplexity.values()]
        rows = [[text, *(f"{x[text]:.2f}" for x in found)] for text in texts]
        rows.append([MEAN, *(f"{mean(x):.2f}" for x in found)])
        kept = None
        if "perplexity" in self.retention:
            of_group = retentions(found[0], found[-1])  # a model may be its own dense one
            kept = [_percent(of_group[row[0]]) for row in rows]
        columns = ["text", *LABELS[: len(found)]]
        _table(output, f"{title}: perplexity, lower is better", columns, rows, kept)
        for name in texts:
            output.line(f"{name}: {_stated(self.blocks[name].described)}")

    def _print_copying(self, output: Output) -> None:
        found = list(self.copying.values())
        row = ["tokens right", *(f"{x.percent:.1f} %" for x in found)]
        known = self.retention.get("copying")
        kept = None if known is None else [_percent(known["repeat"])]
        columns = ["", *LABELS[: len(found)]]
        _table(output, "Copying from context, higher is better", columns, [row], kept)
        how = found[0].protocol
        output.line(
            f"{how['sequences']} sequences of {how['length']} random tokens, each followed by "
            f"itself: of the repeat's {how['tokens']:,} tokens, those held for the likeliest; seed "
            f"{how['seed']}"
        )
        if not _alike(found):
            output.line(
                "the dense model copied other sequences, of another tokenizer or length: nothing "
                "is said of what is retained"
            )

    def _print_tasks(self, output: Output) -> None:
        found = list(self.tasks.values())
        rows, kept = [], []
        for task, score in found[0].items():
            count = "-" if score.samples is None else str(score.samples)
            rows.append([task, score.metric, count, *_cells([x[task] for x in found])])
            kept.append(self._kept(task))
            for metric in score.others:
                figures = [x[task].others[metric] for x in found]
                rows.append(["", metric, "", *_cells(figures)])
                kept.append(_percent(_retained(figures[0], figures[-1])))
        means = [x for scores in found if (x := _mean_of(scores))]
        if means:
            rows.append([MEAN, "", "", "", *(f"{x.value:.4f}" for x in means)])
            kept.append(self._kept(MEAN))
        columns = ["task", "metric", "questions", "std error", *LABELS[: len(found)]]
        compared = kept if "tasks" in self.retention else None
        _table(output, "Tasks", columns, rows, compared)
        for task, flipped in self.flips.items():
            output.line(
                f"{task}: of {flipped.asked} questions {flipped.lost} went from right to wrong and "
                f"{flipped.won} from wrong to right"
            )
        asked = None if self.questions is None else self.questions.described().get("fewshot")
        own = {task: x.fewshot for task, x in found[0].items() if x.fewshot not in (None, asked)}
        if asked is not None and own:
            told = ", ".join(f"{task} {count}" for task, count in own.items())
            output.line(f"tasks that set their examples themselves, whatever --fewshot is: {told}")

    def _kept(self, task: str) -> str:
        """Return what is retained in a task, with the standard error of that if it is known."""
        kept, error = (
            found.get("tasks", {}).get(task) for found in (self.retention, self.retention_stderr)
        )
        return _percent(kept) if kept is None or error is None else f"{kept:.1f} ± {error:.1f} %"


def _alike(copied: Sequence[Copying]) -> bool:
    """Return whether models copied the same sequences: of one tokenizer, and as long."""
    return all(x.protocol == copied[0].protocol for x in copied)


def _retained(ours: Figure, dense: Figure) -> float | None:
    return retention(ours.value, dense.value, higher_is_better=ours.higher_is_better)


def _mean_of(scores: Mapping[str, Score]) -> Figure | None:
    """Return the mean of tasks; None unless all have one kind of figure, better in one way."""
    kinds = {(x.metric.startswith("acc"), x.higher_is_better) for x in scores.values()}
    if len(kinds) != 1:
        return None
    return Figure(mean({task: x.value for task, x in scores.items()}), None, kinds.pop()[1])


def _error(pairs: Iterable[tuple[Score, Score]]) -> float | None:
    """Return the standard error of what is retained in tasks; None where it cannot be told."""
    over, under = [], []
    for ours, dense in pairs:
        if (answers := answers_of(ours, dense)) is None:
            return None
        # What is retained is ours ÷ dense, or dense ÷ ours where lower is better.
        above, below = answers if ours.higher_is_better else answers[::-1]
        over.append(above)
        under.append(below)
    return retention_stderr(over, under)


def _cells(figures: Sequence[Figure]) -> list[str]:
    """Return the standard error of the first model's figure, then the figures."""
    stderr = figures[0].stderr
    return ["-" if stderr is None else f"±{stderr:.4f}", *(f"{x.value:.4f}" for x in figures)]


def _table(
    output: Output, title: str, columns: list[str], rows: list[list[str]], kept: list[str] | None
) -> None:
    """Print a table, with what is retained as its last column if that is known."""
    if kept is not None:
        columns = [*columns, "retained"]
        rows = [[*row, cell] for row, cell in zip(rows, kept, strict=True)]
    output.line()
    output.table(title, columns, rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _overlaps(how: Mapping[str, Any]) -> bool:
    """Return whether blocks of a text overlap."""
    return bool(how["stride"] != how["block_length"])


def _stated(how: Mapping[str, Any]) -> str:
    part = "held-out part" if how["part"] == HELD_OUT else "all"
    overlap = f", one every {how['stride']}" if _overlaps(how) else ""
    return (
        f"{part}, {how['block_count']} blocks of {how['block_length']} tokens{overlap}, documents "
        f"joined by {how['joining'].replace('-', ' ')}; protocol {how['protocol']}"
    )
