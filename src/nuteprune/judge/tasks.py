"""Zero-shot tasks, through lm-evaluation-harness as a library (the extra `eval`)."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.errors import UserError, did_you_mean, in_one_line

SUITES: Final[Mapping[str, tuple[str, ...]]] = {
    "commonsense7": (
        *("boolq", "piqa", "hellaswag", "winogrande"),
        *("arc_easy", "arc_challenge", "openbookqa"),
    )
}
"""Names for several tasks at once; `commonsense7` are the seven that the paper averages."""

# Where options differ in length the accuracy is of length-normalised likelihoods; else the plain
# one counts. Published tables do the same, though not all alike: the metric is stated.
_NORMALIZED: Final = frozenset({"hellaswag", "arc_challenge", "openbookqa"})


@dataclass(frozen=True)
class Figure:
    """A task's figure by one of its metrics.

    Args:
        value: the figure.
        stderr: its standard error, None if the harness gives none.
        higher_is_better: which way is better.
    """

    value: float
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class Score(Figure):
    """What a model reaches in a task: its figure by the metric that counts in means.

    Args:
        metric: its name, such as `acc_norm`.
        samples: questions asked; None for a group of tasks.
        others: the task's other metrics -> figure, in the task's order.
        answers: the figure's value for each question asked, in the order of the questions; None
            where `value` is not their mean.
        fewshot: worked examples before each question; None for a group whose tasks differ.
    """

    metric: str
    samples: int | None
    others: Mapping[str, Figure] = field(default_factory=dict)
    answers: tuple[float, ...] | None = None
    fewshot: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the single answers, fit for JSON."""
        return {k: v for k, v in asdict(self).items() if k != "answers"}


class Flips(NamedTuple):
    """Questions that one of two models has right and the other wrong (arXiv 2407.09141).

    Two models of the same accuracy may differ in many answers; these are counted.
    """

    lost: int
    """Right by the dense model, wrong by the pruned one."""
    won: int
    asked: int


def answers_of(pruned: Score, dense: Score) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return both models' answers to the questions of a task; None where they are not known."""
    mine, theirs = pruned.answers, dense.answers
    if mine is None or theirs is None or len(mine) != len(theirs):
        return None
    return mine, theirs


def flips(pruned: Score, dense: Score) -> Flips | None:
    """Return the flips of a task; None where answers are not right or wrong, or not known."""
    both = answers_of(pruned, dense)
    if both is None or not {*both[0], *both[1]} <= {0.0, 1.0}:
        return None
    pairs = list(zip(*both, strict=True))
    return Flips(pairs.count((0.0, 1.0)), pairs.count((1.0, 0.0)), len(pairs))


class Tasks:
    """Tasks that were found, to ask models.

    Args:
        names: tasks, groups or suites of the harness, or of the folder.
        include_path: folder with further task files (YAML), which go before those of the harness.
        limit: questions per task; None: all.
        fewshot: worked examples before each question, but where a task says that it takes none;
            None: what the task says, mostly 0.

    Raises:
        UserError: if the harness is missing, does not know a name, or cannot ask a task here.
    """

    def __init__(
        self,
        names: Iterable[str],
        include_path: Path | None = None,
        limit: int | None = None,
        fewshot: int | None = None,
    ) -> None:
        if find_spec("lm_eval") is None:
            raise UserError(
                "--tasks needs lm-evaluation-harness, which is not installed; "
                "run: pip install 'nuteprune[eval]'"
            )
        if include_path is not None and not include_path.is_dir():
            raise UserError(
                f"--include-path {include_path} is not a folder; pass one with task files"
            )
        if limit is not None and limit < 1:
            raise UserError(f"--limit {limit}: pass at least 1 question per task")
        self.names = [task for name in names for task in SUITES.get(name, (name,))]
        if not self.names:
            raise UserError("--tasks names no task; pass some, such as --tasks commonsense7")
        self.limit = limit
        self.fewshot = fewshot
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._manager = _manager(self.names, include_path)
        _check(self._manager, self.names)

    def ask(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
    ) -> dict[str, Score]:
        """Ask a model all questions.

        Args:
            model: a causal LM, on its device.
            tokenizer: its tokenizer.
            batch_size: questions per forward pass.

        Returns:
            Task (group, where the harness aggregates one) -> score.

        Raises:
            UserError: if a task's data cannot be had.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
        )
        with _needing_data(), _asking_nobody_else():
            results = simple_evaluate(
                model=harness,
                tasks=list(self.names),
                num_fewshot=self.fewshot,
                limit=self.limit,
                task_manager=self._manager,
                log_samples=True,  # each answer, for errors of paired differences
                bootstrap_iters=100,  # of no use to accuracies, whose error has a closed form
            )
        return read_scores(results or {})

    def described(self) -> dict[str, Any]:
        """Return how scores are made, fit for JSON."""
        return {
            "harness": f"lm_eval {version('lm_eval')}",
            "limit": self.limit,
            "fewshot": self.fewshot,
        }


@contextmanager
def _needing_data() -> Iterator[None]:
    """Turn errors about a task's data into one line."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, DatasetsError) as error:
        raise UserError(
            f"the data of a task cannot be had ({in_one_line(error)}); tasks whose data is "
            "local go into a folder for --include-path"
        ) from error


def _asking_nobody_else() -> AbstractContextManager[Any]:
    """Keep the harness from asking git and the system for facts for its log."""
    from unittest.mock import Mock, patch

    from lm_eval import evaluator

    nothing = Mock(return_value=None)
    # Versions of the harness that lack one of them do without.
    return patch.multiple(evaluator, create=True, get_git_commit_hash=nothing, add_env_info=nothing)


def _manager(names: list[str], include_path: Path | None) -> Any:
    """Return the harness's task manager; its own tasks, thousands, are read only if needed."""
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if folder is not None and not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, (*SUITES, *manager.all_tasks))
            raise UserError(f"the harness knows no task {name!r}{hint}")
    return manager


def _check(manager: Any, names: list[str]) -> None:
    """Refuse tasks that the harness would refuse, before a model is loaded for them."""
    # Known without making them, which for some runs code already.
    code = [name for name in names if (manager.task_index[name].cfg or {}).get("unsafe_code")]
    try:
        with _needing_data():
            tasks: dict[str, Any] = {} if code else manager.load(list(names))["tasks"]
    except UserError:
        raise
    except Exception as error:  # whatever a task's file or its code is not fit for
        raise UserError(
            f"the harness cannot make these tasks ({in_one_line(error)}); leave out what it names"
        ) from error
    code += [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if code:
        raise UserError(f"task {code[0]} runs code that the model writes, which is not done here")
    if seen := [name for name, task in tasks.items() if getattr(task, "MULTIMODAL", False)]:
        raise UserError(f"task {seen[0]} is of images or sound; models are asked in text alone")


def read_scores(results: Mapping[str, Any]) -> dict[str, Score]:
    """Read the figures of each task from what the harness returns.

    Args:
        results: what `lm_eval.simple_evaluate` returns.

    Returns:
        Task -> score; tasks of a group that has a figure of its own are left out.
    """
    rows: Mapping[str, Mapping[str, Any]] = results.get("results", {})
    subtasks = results.get("group_subtasks", {})
    averaged = (members for group, members in subtasks.items() if _metrics(rows.get(group)))
    hidden = {task for members in averaged for task in members}
    found = {task: _metrics(row) for task, row in rows.items() if task not in hidden}
    return {task: _score(task, keys, results) for task, keys in found.items() if keys}


def _score(task: str, keys: list[str], results: Mapping[str, Any]) -> Score:
    names = [key.partition(",")[0] for key in keys]
    normalized = task in _NORMALIZED
    suited = (x for x, name in zip(keys, names, strict=True) if (name == "acc_norm") == normalized)
    counts = next(suited, keys[0])
    row, better = results["results"][task], results.get("higher_is_better", {}).get(task, {})

    def figure(key: str) -> Figure:
        name, _, kind = key.partition(",")
        stderr = row.get(f"{name}_stderr,{kind}")
        known = float(stderr) if isinstance(stderr, (int, float)) else None
        return Figure(float(row[key]), known, better.get(name) is not False)

    others = {
        # The harness names a metric once for each way to read an answer (gsm8k).
        name if names.count(name) == 1 else key: figure(key)
        for name, key in zip(names, keys, strict=True)
        if key != counts
    }
    return Score(
        **asdict(figure(counts)),
        metric=counts.partition(",")[0],
        samples=results.get("n-samples", {}).get(task, {}).get("effective"),
        others=others,
        answers=_answers(results.get("samples", {}).get(task), counts, float(row[counts])),
        fewshot=results.get("n-shot", {}).get(task),
    )


def _answers(
    samples: Iterable[Mapping[str, Any]] | None, key: str, value: float
) -> tuple[float, ...] | None:
    """Return a metric's value for each question, None unless the task's figure is their mean."""
    name, _, kind = key.partition(",")
    asked = [x for x in samples or () if x.get("filter", kind) == kind]
    ordered = sorted(asked, key=lambda x: x["doc_id"])
    values = [x.get(name) for x in ordered]
    if not values or not all(isinstance(x, (int, float)) for x in values):
        return None
    answers = tuple(float(x) for x in values if x is not None)
    same = math.isclose(statistics.fmean(answers), value, rel_tol=1e-6, abs_tol=1e-9)
    return answers if same else None


def _metrics(row: Mapping[str, Any] | None) -> list[str]:
    """Return the keys of a task's figures, standard errors left out, in the task's order."""
    return [
        key
        for key, value in (row or {}).items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    ]
