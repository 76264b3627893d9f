from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nuteprune.data.training_text import training_blocks
from nuteprune.export.loading import load_pruned
from nuteprune.jobs import evaluate
from nuteprune.jobs.options import Evaluation
from nuteprune.judge import context
from nuteprune.judge.context import Copying
from nuteprune.judge.tasks import Score
from nuteprune.stages import judge as judging
from tests.conftest import Run, json_line

pytestmark = pytest.mark.slow

ASKED = ["--device", "cpu", "--dtype", "float32", "--json"]


def prune(run: Run, model: Path, text: Path, out: Path, *more: str) -> None:
    options = {"sparsity": 0.3, "data": text, "out": out, "steps": 4, "batch-size": 2}
    flags = [x for name, value in options.items() for x in (f"--{name}", value)]
    fixed = ["--length", 24, *ASKED[:-1], "--set", "neuron_multiple=4"]
    assert run("prune", model, *flags, *fixed, *more)[0] == 0


@pytest.mark.slow
def test_retention_is_dense_over_pruned(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    prune(run, model, text, out)
    held_out = ["--data", text, "--length", 24]
    code, stdout, stderr = run("eval", out, "--against", model, *held_out, *ASKED)
    assert (code, "Traceback" in stderr) == (0, False)
    found = json_line(stdout)
    ours, dense = (found["perplexity"][str(x)]["text.txt"] for x in (out, model))
    kept = found["retention"]["perplexity"]
    assert kept["text.txt"] == kept["mean"] == pytest.approx(100 * dense / ours)
    assert found["protocol"]["texts"]["text.txt"]["block_length"] == 24
    code, stdout, _ = run("eval", out, *held_out, "--device", "cpu")
    assert code == 0
    assert "held-out part" in stdout
    assert "retained" not in stdout


def test_each_embedded_text_is_in_domain_by_itself(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {name: [f"The {name} see the grapes. " * 9] * 9 for name in ("wikipedia", "recipes")}
    monkeypatch.setattr(
        "nuteprune.data.demo.documents",
        lambda domains: {name: texts[name] for name in texts if name in domains},
    )
    asked = Evaluation("unused", length=24, whole=True)
    known = training_blocks("demo:wikipedia", tiny_tokenizer, length=8, count=1, seed=0).fingerprint
    blocks = evaluate._blocks(asked, tiny_tokenizer, [known])
    kinds = {name: x.described["kind"] for name, x in blocks.items()}
    assert kinds == {"wikipedia": "in-domain", "recipes": "other text"}


@pytest.mark.slow
def test_text_that_calibrated_the_model_stands_apart_and_copying_is_measured(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tmp_path / "other.txt"
    prune(run, model, text, out)
    other.write_text("\n\n".join(f"A fox number {i} sees the grapes. " * 5 for i in range(400)))
    both = ["--data", text, "--data", other, "--length", 24, "--device", "cpu"]
    code, stdout, stderr = run("eval", out, "--against", model, *both, "--json")
    assert code == 0, stderr
    found = json_line(stdout)
    kinds = {name: x["kind"] for name, x in found["protocol"]["texts"].items()}
    assert kinds == {"text.txt": "in-domain", "other.txt": "other text"}
    tables = stderr.split("In-domain text")[1].split("Other text")
    titles = [line for line in stderr.splitlines() if "is better" in line]
    assert [title.partition(" (")[0].strip() for title in titles] == [
        *("In-domain text", "Other text", "Copying from context, higher is better"),
    ]
    assert [("text.txt" in x, "other.txt" in x) for x in tables] == [(True, False), (False, True)]
    shares = found["copying"]
    assert set(shares) == {str(out), str(model)}
    how = found["copying_protocol"][str(out)]
    assert how == found["copying_protocol"][str(model)]
    assert how["seed"] not in range(10)
    kept = found["retention"]["copying"]["repeat"]
    dense = shares[str(model)]
    assert kept == (pytest.approx(100 * shares[str(out)] / dense) if dense else None)
    # A name says nothing: what was read is known in any folder, under any name.
    for name, content in (("elsewhere", other), ("a-copy", text)):
        (tmp_path / name).mkdir()
        shutil.copy(content, tmp_path / name / "text.txt")
        monkeypatch.chdir(tmp_path / name)
        code, stdout, _ = run("eval", out, "--data", "text.txt", *both[4:], "--json")
        kind = json_line(stdout)["protocol"]["texts"]["text.txt"]["kind"]
        assert kind == {"elsewhere": "other text", "a-copy": "in-domain"}[name]
    # Where nothing is known of the text that a record names, that is said.
    record = json.loads((out / "nuteprune.json").read_text())
    assert record["text"]["judged"] == {"text.txt": "in-domain"}
    del record["text"]
    (out / "nuteprune.json").write_text(json.dumps(record))
    code, stdout, stderr = run("eval", out, "--data", text, "--length", 24, "--json")
    assert json_line(stdout)["protocol"]["texts"]["text.txt"]["kind"] == "not known"
    assert "Text of which no record tells" in stderr
    # A record of a training loop of one's own names no text.
    del record["config"]["data"]
    (out / "nuteprune.json").write_text(json.dumps(record))
    code, stdout, stderr = run("eval", out, "--data", text, "--length", 24, "--json")
    assert code == 0, stderr
    assert json_line(stdout)["protocol"]["texts"]["text.txt"]["kind"] is None
    # A dense model has no record that would tell.
    code, stdout, _ = run("eval", model, *both, "--copying-seed", 3, "--json")
    found = json_line(stdout)
    assert code == 0
    assert {x["kind"] for x in found["protocol"]["texts"].values()} == {None}
    assert found["copying_protocol"][str(model)]["seed"] == 3


def test_a_published_protocol_is_the_models_own_loss_on_joined_rows(
    model: Path, tiny_tokenizer, tmp_path: Path, run: Run
) -> None:
    rows = ["", "The student learns", "", "from a teacher that is a little less pruned"]
    (tmp_path / "copy.jsonl").write_text("\n".join(json.dumps({"text": x}) for x in rows))
    spec = f"wikitext2={tmp_path / 'copy.jsonl'}"
    code, stdout, _ = run("eval", model, "--data", spec, "--length", 8, *ASKED)
    assert code == 0
    found = json_line(stdout)
    assert found["protocol"]["texts"]["wikitext2"]["protocol"] == "nuteprune"
    ids = torch.tensor(tiny_tokenizer("\n\n".join(rows))["input_ids"])
    blocks = ids[: len(ids) // 8 * 8].view(-1, 8)
    with torch.no_grad():
        loss = load_pruned(model)(input_ids=blocks, labels=blocks).loss
    assert found["perplexity"][str(model)]["wikitext2"] == pytest.approx(
        float(loss.exp()), rel=1e-4
    )


@pytest.mark.filterwarnings("default")
def test_local_tasks(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    questions = [{"q": f"Teacher {i}", "label": i % 2} for i in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "school.yaml").write_text(
        f"task: school\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'q.jsonl'}}}}}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: ["student", "pruned"]\ndoc_to_target: label\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    tasks = ["--tasks", "school", "--include-path", tmp_path]
    code, stdout, stderr = run("eval", model, "--against", model, *tasks, *ASKED)
    assert code == 0, stderr
    found = json_line(stdout)
    assert found["perplexity"] == {}
    score = found["tasks"][str(model)]["school"]
    assert (score["metric"], score["samples"]) == ("acc", 4)
    assert found["retention"]["tasks"] == {"school": 100, "mean": 100}


def test_both_models_answer_the_prompts_of_a_file(model: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": "the student"}\n{"prompt": "a teacher"}\n')
    given = ["--against", model, "--prompts", tmp_path / "asked.jsonl", "--answer-tokens", 5]
    code, stdout, stderr = run("eval", model, *given, "--tasks", "", *ASKED)
    assert (code, stdout) == (2, "")
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"Teacher {i} is less pruned. " * 9 for i in range(80)))
    code, stdout, stderr = run("eval", model, *given, "--data", text, "--length", 24, *ASKED)
    assert code == 0, stderr
    found = json_line(stdout)
    answers = found["answers"]
    assert (answers["kl"], answers["agreement"]) == (0, 100)
    how = answers["protocol"]
    assert (how["prompts"], how["answers"], how["most_tokens"]) == ("of asked.jsonl", 2, 5)
    assert {x["prompt"] for x in found["samples"]} == {"the student", "a teacher"}
    assert "context" not in found  # blocks of 24 are too short
    assert "looping, %" in stderr


def test_context_is_measured_in_batches_of_the_size_asked_for(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"Teacher {i} is less pruned. " * 9 for i in range(80)))
    likelihoods, sizes = context.likelihoods, []

    def noted(of: Any, blocks: Any, count: int, batch_size: int, *more: Any) -> Any:
        sizes.append(batch_size)
        return likelihoods(of, blocks, count, batch_size, *more)

    monkeypatch.setattr(context, "likelihoods", noted)
    monkeypatch.setattr(context, "SCORED", 16)
    monkeypatch.setattr(judging, "SPANS", (context.Span(8, 4),))
    given = ["--against", model, "--data", text, "--length", 24, "--answer-tokens", 2]
    code, _, stderr = run("eval", model, *given, "--batch-size", 3, *ASKED)
    assert code == 0, stderr
    assert sizes[:2] == [3, 3]


def test_each_model_is_asked_with_its_own_tokenizer(
    model: Path,
    sentencepiece_tokenizer: Any,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    sentencepiece_tokenizer.save_pretrained(other)
    seen = []

    class Questions:
        def __init__(self, *_: Any) -> None:
            pass

        def ask(self, _: Any, tokenizer: Any, *__: Any) -> dict[str, Score]:
            seen.append(tokenizer("the student").input_ids)
            return {"school": Score(1.0, None, True, "acc", 4)}

        def described(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(evaluate, "Tasks", Questions)
    code, _, stderr = run("eval", model, "--against", other, "--tasks", "school", *ASKED)
    assert code == 0, stderr
    ours, theirs = seen
    assert theirs == sentencepiece_tokenizer("the student").input_ids != ours


def test_where_copying_cannot_be_measured_the_rest_is(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    measure, calls = evaluate.copying, []

    def only_the_first(*args: Any, **how: Any) -> Copying | None:
        calls.append(args)
        return measure(*args, **how) if len(calls) == 1 else None

    monkeypatch.setattr(evaluate, "copying", only_the_first)
    asked = ["--against", other, "--data", text, "--length", 24, *ASKED]
    code, stdout, stderr = run("eval", model, *asked)
    assert code == 0, stderr
    found = json_line(stdout)
    assert (list(found["copying"]), list(found["retention"])) == ([str(model)], ["perplexity"])
    assert "Copying" not in stderr


BAD = {
    "unknown protocol": (["--protocol", "nutprune"], "held-out, nuteprune"),
    "unknown joining": (["--joining", "comma"], "blank-line"),
    "stride beyond the length": (["--length", "8", "--stride", "9"], "stride"),
    "no such text": (["--data", "nope.txt"], "nope.txt"),
    "the same text twice": (["--data", "TEXT", "--data", "TEXT"], "only once"),
    "text too short": (["--data", "TEXT", "--length", "99999"], "a block takes 99999"),
    "batch size 0": (["--batch-size", "0"], "from 1 to"),
    "prompts for one model": (["--prompts", "a.jsonl"], "--against"),
    "answers of one model": (["--answer-tokens", "9"], "--against"),
    "no answers": (["--answer-tokens", "0"], "--answer-tokens 0: pass a number from 1"),
    "copying seed too large": (["--copying-seed", str(2**64)], "from 0 to 2147483647"),
    "fewer than no examples": (
        ["--tasks", "piqa", "--fewshot", "-1"],
        "a number from 0",
    ),
    "limit without tasks": (["--limit", "3"], "--tasks"),
    "text for tasks alone": (["--tasks", "piqa", "--length", "512"], "--length is for text"),
    "answers for tasks alone": (
        ["--tasks", "piqa", "--against", "demo", "--answer-tokens", "9"],
        "--answer-tokens is for text",
    ),
    "unknown option": (["--set", "lora_rank=3"], "No such option"),
    "no number": (["--length", "many"], "--length"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, model: Path, text: Path, run: Run
) -> None:
    args, expected = BAD[case]
    given = [str(text) if x == "TEXT" else x for x in args]
    data = [] if {"--data", "--tasks"} & {*args} else ["--data", str(text)]
    code, _, stderr = run("eval", model, "--device", "cpu", *data, *given)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert (code, len(lines)) == (2, 1), stderr
    assert expected in lines[0]


def test_other_tokens_do_not_compare(
    model: Path, text: Path, sentencepiece_tokenizer: Any, tmp_path: Path, run: Run
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    sentencepiece_tokenizer.save_pretrained(other)
    code, _, stderr = run("eval", model, "--against", other, "--data", text, "--device", "cpu")
    assert code == 2
    assert "another tokenizer" in stderr


def test_a_model_of_damaged_weights_has_no_perplexity(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    code, stdout, stderr = run("eval", damaged, "--data", text, "--length", 24, *ASKED)
    assert (code, stdout) == (1, "")
    assert f"the perplexity of {damaged} is not finite" in stderr
