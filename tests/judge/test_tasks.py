from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from nuteprune.console import Output
from nuteprune.errors import UserError
from nuteprune.judge import tasks
from nuteprune.judge.tasks import COMMONSENSE7, Score, Tasks, read_scores
from nuteprune.judge.verdicts import Verdicts

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval"
)

QUESTIONS = [
    {"question": f"The teacher number {i} is", "choices": ["a student", "pruned"], "label": i % 2}
    for i in range(6)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "school.yaml").write_text(
        f"""
task: school
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "q.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
    )
    return tmp_path


@needs_harness
@pytest.mark.filterwarnings("default")  # the harness and what it brings along have many
def test_a_local_task_is_scored_as_by_hand(folder: Path, tiny_model, tiny_tokenizer) -> None:
    model = tiny_model("llama", vocab_size=300)
    (name, score), *others = Tasks(["school"], folder).ask(model, tiny_tokenizer).items()
    assert (name, score.metric, score.samples, others) == ("school", "acc", 6, [])

    def likelihood(question: str, choice: str) -> float:
        context = tiny_tokenizer(question)["input_ids"]
        answer = tiny_tokenizer(" " + choice)["input_ids"]
        ids = torch.tensor([context + answer])
        with torch.no_grad():
            log = model(ids).logits.log_softmax(-1)[0]
        return sum(float(log[len(context) + i - 1, t]) for i, t in enumerate(answer))

    right = [
        max(range(2), key=lambda i, q=q: likelihood(q["question"], q["choices"][i])) == q["label"]
        for q in QUESTIONS
    ]
    assert score.value == pytest.approx(sum(right) / 6)
    assert Tasks(["school"], folder, limit=2).ask(model, tiny_tokenizer)["school"].samples == 2


@needs_harness
@pytest.mark.filterwarnings("default")
def test_unknown_tasks_and_missing_data_are_the_users(
    folder: Path, tiny_model, tiny_tokenizer
) -> None:
    with pytest.raises(UserError, match="did you mean school"):
        Tasks(["schol"], folder)
    with pytest.raises(UserError, match="no folder"):
        Tasks(["school"], folder / "nope")
    with pytest.raises(UserError, match="at least 1"):
        Tasks(["school"], folder, limit=0)
    (folder / "q.jsonl").unlink()
    with pytest.raises(UserError, match="cannot be had"):
        Tasks(["school"], folder).ask(tiny_model("llama", vocab_size=300), tiny_tokenizer)


def test_without_the_harness_the_command_to_get_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'nuteprune\[eval\]'"):
        Tasks(["commonsense7"])


def test_the_papers_seven_have_one_name() -> None:
    assert len(set(COMMONSENSE7)) == 7
    assert tasks.SUITES["commonsense7"] == COMMONSENSE7


def test_one_figure_per_task_is_read() -> None:
    results = {
        "results": {
            "hellaswag": {"alias": "x", "acc,none": 0.4, "acc_norm,none": 0.5},
            "piqa": {"acc,none": 0.7, "acc_stderr,none": 0.01, "acc_norm,none": 0.6},
            "bits": {"bits_per_byte,none": 0.9, "bits_per_byte_stderr,none": "N/A"},
            "school": {"acc,none": 0.3},
            "school_a": {"acc,none": 0.2},
            "lesson": {"acc,none": 0.25},
            "empty": {"alias": "empty"},
        },
        "group_subtasks": {"school": ["school_a"], "school_a": ["lesson"], "empty": ["bits"]},
        "higher_is_better": {"bits": {"bits_per_byte": False}, "piqa": {"acc": True}},
        "n-samples": {"piqa": {"original": 99, "effective": 10}},
    }
    scores = read_scores(results)
    found = {task: (x.metric, x.value) for task, x in scores.items()}
    assert found == {
        "hellaswag": ("acc_norm", 0.5),
        "piqa": ("acc", 0.7),
        "bits": ("bits_per_byte", 0.9),
        "school": ("acc", 0.3),
    }
    assert (scores["piqa"].stderr, scores["piqa"].samples) == (0.01, 10)
    assert not scores["bits"].higher_is_better
    assert scores["bits"].stderr is None


def test_unlike_figures_have_no_mean(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy, other = Score(0.5, "acc", None, True, 4), Score(0.25, "acc_norm", None, True, 4)
    guess = Score(25.3, "perplexity", None, False, 4)
    for scores, has_mean in (
        ({"a": accuracy, "b": other}, True),
        ({"a": accuracy, "b": guess}, False),
    ):
        Verdicts({}, None, tasks={"small": scores}).print(Output())
        assert ("mean" in capsys.readouterr().out) == has_mean
