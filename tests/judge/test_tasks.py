from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nuteprune.console import Output
from nuteprune.errors import UserError
from nuteprune.jobs.verdicts import Verdicts
from nuteprune.judge import tasks
from nuteprune.judge.tasks import Figure, Score, Tasks, flips, read_scores

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
    assert score.answers == tuple(map(float, right))
    assert list(score.others) == ["acc_norm"]
    assert set(score.to_dict()) == {
        *("value", "metric", "stderr", "higher_is_better", "samples", "others", "fewshot"),
    }
    assert Tasks(["school"], folder, limit=2).ask(model, tiny_tokenizer)["school"].samples == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_unknown_tasks_and_missing_data_are_the_users(
    folder: Path, tiny_model, tiny_tokenizer
) -> None:
    with pytest.raises(UserError, match="did you mean school"):
        Tasks(["schol"], folder)
    with pytest.raises(UserError, match="is not a folder"):
        Tasks(["school"], folder / "nope")
    with pytest.raises(UserError, match="at least 1"):
        Tasks(["school"], folder, limit=0)
    (folder / "q.jsonl").unlink()
    with pytest.raises(UserError, match="cannot be had"):
        Tasks(["school"], folder).ask(tiny_model("llama", vocab_size=300), tiny_tokenizer)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_what_the_harness_would_refuse_is_refused_before_a_model_is_there(folder: Path) -> None:
    (folder / "all.yaml").write_text("group: schools\ntask: [school]\n")
    with pytest.raises(UserError, match=r"Duplicate task .school.: found in both"):
        Tasks(["schools", "school"], folder)
    school = (folder / "school.yaml").read_text()
    risky = school.replace("task: school", "task: risky\nunsafe_code: true")
    (folder / "risky.yaml").write_text(risky)
    (folder / "some.yaml").write_text("group: some\ntask: [school, risky]\n")
    for name in ("risky", "some"):
        with pytest.raises(UserError, match="task risky runs code that the model writes"):
            Tasks([name], folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_task_that_takes_no_examples_gets_none(folder: Path, tiny_model, tiny_tokenizer) -> None:
    with (folder / "school.yaml").open("a") as file:
        file.write("num_fewshot: 0\n")
    questions = Tasks(["school"], folder, limit=2, fewshot=1)
    found = questions.ask(tiny_model("llama", vocab_size=300), tiny_tokenizer)
    assert found["school"].fewshot == 0
    assert questions.described()["fewshot"] == 1


def test_without_the_harness_the_command_to_get_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'nuteprune\[eval\]'"):
        Tasks(["commonsense7"])


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


def test_all_metrics_of_a_task_are_read() -> None:
    results = {
        "results": {
            "lambada": {
                **{"alias": "lambada", "perplexity,none": 44.5, "perplexity_stderr,none": 1.5},
                **{"acc,none": 0.35, "acc_stderr,none": 0.01},
            },
            "gsm8k": {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5},
        },
        "higher_is_better": {"lambada": {"perplexity": False, "acc": True}},
        "samples": {
            "gsm8k": [
                {"doc_id": 1, "filter": "strict-match", "exact_match": 0.5},
                {"doc_id": 0, "filter": "strict-match", "exact_match": 0.0},
                {"doc_id": 0, "filter": "flexible-extract", "exact_match": 1.0},
                {"doc_id": 1, "filter": "flexible-extract", "exact_match": 0.0},
            ],
            # A perplexity is no mean over questions.
            "lambada": [{"doc_id": 0, "filter": "none", "perplexity": -3.0, "acc": 0.0}],
        },
    }
    scores = read_scores(results)
    assert (scores["lambada"].metric, scores["lambada"].value) == ("perplexity", 44.5)
    assert scores["lambada"].others == {"acc": Figure(0.35, 0.01, True)}
    assert scores["lambada"].answers is None
    assert scores["gsm8k"].metric == "exact_match"
    assert list(scores["gsm8k"].others) == ["exact_match,flexible-extract"]
    assert scores["gsm8k"].answers == (0.0, 0.5)


def test_the_table_and_the_json_show_all_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    def score(perplexity: float, accuracy: float) -> Score:
        others = {"acc": Figure(accuracy, 0.01, True)}
        return Score(perplexity, 1.5, False, "perplexity", 9, others)

    found = {"small": {"lambada": score(50.0, 0.3)}, "large": {"lambada": score(40.0, 0.4)}}
    verdicts = Verdicts({}, None, tasks=found)
    verdicts.compare("small", "large")
    verdicts.print(Output())
    lines = [" ".join(x.split()) for x in capsys.readouterr().out.splitlines()]
    assert "lambada perplexity 9 ±1.5000 50.0000 40.0000 80.0 %" in lines
    assert "acc ±0.0100 0.3000 0.4000 75.0 %" in lines
    told = verdicts.to_dict()["tasks"]["small"]["lambada"]
    assert told["others"] == {"acc": {"value": 0.3, "stderr": 0.01, "higher_is_better": True}}


def test_retention_has_the_paired_error_of_its_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    def score(*answers: float) -> Score:
        value = sum(answers) / len(answers)
        return Score(value, None, True, "acc", len(answers), answers=answers)

    ours = {"a": score(1, 0, 1, 1), "b": score(0, 1, 0, 1)}
    dense = {"a": score(1, 1, 1, 1), "b": score(0, 1, 1, 1)}
    verdicts = Verdicts({}, None, tasks={"small": ours, "large": dense})
    verdicts.compare("small", "large")
    errors = verdicts.to_dict()["retention_stderr"]["tasks"]
    # In task a 0.75 - x are 1/4, -3/4, 1/4, 1/4: their variance is 1/4, of the mean's 1/16.
    assert errors["a"] == pytest.approx(25)
    verdicts.print(Output())
    lines = [" ".join(x.split()) for x in capsys.readouterr().out.splitlines()]
    assert "a acc 4 - 0.7500 1.0000 75.0 ± 25.0 %" in lines
    assert any(x.startswith("mean") and "±" in x for x in lines)
    # Without the answers of one task neither it nor the mean has an error.
    verdicts.tasks["large"]["b"] = Score(0.75, None, True, "acc", 4)
    verdicts.compare("small", "large")
    errors = verdicts.retention_stderr["tasks"]
    assert (errors["b"], errors["mean"]) == (None, None)
    assert errors["a"] == pytest.approx(25)


def test_flips_are_counted_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    def score(*answers: float) -> Score:
        value = sum(answers) / len(answers)
        return Score(value, None, True, "acc", len(answers), answers=answers)

    ours = {"a": score(1, 0, 0, 1, 0), "b": score(0.5, 1), "c": score(1, 0)}
    dense = {"a": score(1, 1, 1, 0, 0), "b": score(0.0, 1), "c": Score(0.5, None, True, "acc", 2)}
    verdicts = Verdicts({}, None, tasks={"small": ours, "large": dense})
    assert verdicts.to_dict()["flips"] == {}
    verdicts.compare("small", "large")
    # Those of b are no right or wrong, those of c are not known.
    assert verdicts.to_dict()["flips"] == {"a": {"lost": 2, "won": 1, "asked": 5}}
    verdicts.print(Output())
    said = "a: of 5 questions 2 went from right to wrong and 1 from wrong to right"
    assert said in capsys.readouterr().out
    assert flips(ours["a"], score(1, 1)) is None


def test_the_error_of_what_is_better_low_is_that_of_the_same_ratio() -> None:
    def verdict(ours: list[float], dense: list[float], higher: bool) -> Verdicts:
        def score(answers: list[float]) -> Score:
            return Score(sum(answers) / 4, None, higher, "mae", 4, answers=tuple(answers))

        found = Verdicts({}, None, tasks={"a": {"t": score(ours)}, "b": {"t": score(dense)}})
        found.compare("a", "b")
        return found

    small, large = [0.2, 0.3, 0.25, 0.25], [0.5, 0.4, 0.6, 0.5]
    low, high = verdict(large, small, higher=False), verdict(small, large, higher=True)
    assert low.retention["tasks"]["t"] == high.retention["tasks"]["t"] == pytest.approx(50)
    assert low.retention_stderr["tasks"] == high.retention_stderr["tasks"]
    assert low.retention_stderr["tasks"]["t"] == pytest.approx(7.07, abs=0.01)


def test_unlike_figures_have_no_mean(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy, other = Score(0.5, None, True, "acc", 4), Score(0.25, None, True, "acc_norm", 4)
    guess = Score(25.3, None, False, "perplexity", 4)
    for scores, has_mean in (
        ({"a": accuracy, "b": other}, True),
        ({"a": accuracy, "b": guess}, False),
    ):
        Verdicts({}, None, tasks={"small": scores}).print(Output())
        assert ("mean" in capsys.readouterr().out) == has_mean
