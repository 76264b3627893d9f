"""Own answers: what is asked, what repeats, and that reading them makes repeats less likely."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from nuteprune.judge import answers
from nuteprune.judge.answers import repeated, repeats
from nuteprune.processes import ALONE
from nuteprune.train import own_answers
from nuteprune.train.own_answers import OwnAnswers, prompts_in

from .conftest import LENGTH, make

ASKS, ANSWERS = [90, 91], [92, 93]


def test_what_completes_a_4_gram_again_repeats() -> None:
    answer = [1, 2, 3, 4, 1, 2, 3, 4, 5, 2, 3, 4, 5]
    marks = list(repeats(answer))
    assert marks == [i in (7, 12) for i in range(len(answer))]
    grams = len(answer) - 3
    assert sum(marks) / grams == pytest.approx(repeated(answer))
    assert list(repeats([1, 2, 3])) == [False] * 3


def test_questions_are_asked_as_they_stand_in_the_text(monkeypatch) -> None:
    monkeypatch.setattr(own_answers, "ANSWERS", 2)
    row = [5, *ASKS, 7, 8, *ANSWERS, 9, *ASKS, 6, *ANSWERS, 4, 4]
    cut_off = [*ANSWERS, 3, *ASKS, *[5] * 8, 92]
    blocks = torch.tensor([row, cut_off + [1] * (len(row) - len(cut_off))])
    asked = [[*ASKS, 7, 8, *ANSWERS], [*ASKS, 6, *ANSWERS]]
    assert prompts_in(blocks, ASKS, ANSWERS, []) == asked
    assert prompts_in(blocks, [1, *ASKS], ANSWERS, [1]) == asked  # it begins each block
    long = torch.tensor([[*ASKS, *[7] * 9, *ANSWERS, 4, 4]])
    assert prompts_in(torch.cat([blocks, long]), ASKS, ANSWERS, []) == asked
    monkeypatch.setattr(own_answers, "ANSWERS", 3)
    assert {len(x) for x in prompts_in(blocks, ASKS, ANSWERS, [])} == {len(row) // 2}
    monkeypatch.setattr(own_answers, "BEGINNING", 4)
    assert prompts_in(blocks, ASKS, ANSWERS, []) == blocks[:, :4].tolist()
    monkeypatch.setattr(own_answers, "ANSWERS", 2)
    assert prompts_in(blocks, [1], ANSWERS, [1]) == blocks[:, :4].tolist()  # BOS alone asks


def made(**more: Any) -> OwnAnswers:
    prompts = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    how = {"ends": {2}, "bos": [1], "length": LENGTH, "first": 6, "seed": 0}
    return OwnAnswers(prompts, **{**how, **more})


def test_answers_that_repeat_are_kept_up_to_their_first_repeats(tiny_model, monkeypatch) -> None:
    said = {6: [20, 21, 22, 23] * 4, 9: [30, 31, 32, 33, 34], 12: [40] * 9}

    def write(model: Any, prompts: list[list[int]], *_: Any) -> list[list[int]]:
        assert all(x[0] == 1 for x in prompts)
        return [said[x[2]] for x in prompts]

    monkeypatch.setattr(own_answers, "write", write)
    monkeypatch.setattr(own_answers, "ENOUGH", 2)
    answers = made()
    answers.write(tiny_model("llama"), 6, ALONE)
    assert (answers.ids_NT[:, 0] == 1).all()
    assert not answers.repeats_NT[:, 0].any()
    ids, marks = (x[:, 1:].flatten().tolist() for x in (answers.ids_NT, answers.repeats_NT))
    kept = [[5, 6, 7, *[20, 21, 22, 23] * 2, 20], [11, 12, 13, *[40] * 6]]
    orders = [kept[0] + kept[1], kept[1] + kept[0]]
    assert ids in [(x * 2)[: len(ids)] for x in orders]
    assert sum(marks[: len(orders[0])]) == 4
    said |= {6: [20], 12: [40, 41]}
    answers.write(tiny_model("llama"), 7, ALONE)
    assert answers.ids_NT.shape == answers.repeats_NT.shape == (0, LENGTH)


def test_processes_read_blocks_of_their_own_batch_by_batch() -> None:
    answers = made()
    answers.ids_NT = torch.arange(5)[:, None].expand(5, LENGTH)
    answers.repeats_NT = answers.ids_NT > 3

    def read(process: int) -> list[list[int]]:
        answers.read, device = 0, torch.device("cpu")
        args = SimpleNamespace(process_index=process, world_size=2, device=device)
        args.per_device_train_batch_size = 2
        found = [answers.next_blocks(cast(Any, args)) for _ in range(2)]
        assert all(torch.equal(repeats, ids > 3) for ids, repeats in found)
        return [ids[:, 0].tolist() for ids, _ in found]

    assert read(0) == [[0, 1], [4, 0]]
    assert read(1) == [[2, 3], [1, 2]]


def test_the_last_steps_read_them() -> None:
    answers = made(first=12)
    steps = range(12 + 2 * own_answers.EVERY)
    assert [x for x in steps if answers.due(x)] == [12, 12 + own_answers.EVERY]
    assert [x for x in steps if answers.read_in(x)] == list(steps)[12:]


def chance_of_repeats(trainer: Any, rows: Tensor, marks: Tensor) -> float:
    with trainer.as_pruned(), torch.no_grad():
        logits = trainer.anatomy.model(input_ids=rows).logits
    p = torch.softmax(logits[:, :-1].float(), -1).gather(-1, rows[:, 1:, None])[..., 0]
    return float(p[marks[:, 1:]].mean())


@pytest.mark.slow
def test_what_repeats_gets_less_likely(
    tiny_model, tiny_chat_tokenizer, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(own_answers, "LAST", 0.5)
    monkeypatch.setattr(answers, "GRAM", 1)
    write, written = OwnAnswers.write, []

    def noted(answers: OwnAnswers, *args: Any) -> None:
        write(answers, *args)
        written.append((answers.ids_NT, answers.repeats_NT))

    monkeypatch.setattr(OwnAnswers, "write", noted)
    found = {}
    for weight in (0.0, 1000.0):  # tokens of random weights have little to lose
        given = {"processing_class": tiny_chat_tokenizer}
        how = {"unlikelihood": weight, "max_steps": 24, "per_device_train_batch_size": 4}
        trainer = make(tiny_model("llama"), tmp_path / str(weight), given=given, **how)
        trainer.train()
        assert (trainer.answers is not None) == bool(weight)
        found[weight] = trainer
    rows, marks = written[0]
    assert marks.any()
    chance = {weight: chance_of_repeats(x, rows, marks) for weight, x in found.items()}
    assert chance[1000.0] < 0.9 * chance[0.0]


@pytest.mark.slow
def test_resumed_between_two_answers_is_never_interrupted(
    tiny_model, tiny_chat_tokenizer, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(own_answers, "LAST", 0.75)

    def trained(folder: Path, resumes: bool = False) -> dict[str, Tensor]:
        given = {"processing_class": tiny_chat_tokenizer}
        how = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 5}
        how |= {"target_sparsity": 0.4}  # where its answers repeat
        trainer = make(tiny_model("llama"), folder, given=given, max_steps=8, **how)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resumes else None)
        assert len(trainer.answers.ids_NT)
        lora: dict[str, Tensor] = trainer.prepared.bank.lora()
        return {name: x.clone() for name, x in lora.items()}

    whole = trained(tmp_path / "run")  # answers before step 2, a checkpoint after step 4
    again = trained(tmp_path / "run", resumes=True)
    assert all(torch.equal(x, again[name]) for name, x in whole.items())


def test_a_model_without_a_chat_template_reads_none(
    tiny_model, tiny_tokenizer, tiny_chat_tokenizer, tmp_path: Path
) -> None:
    for tokenizer, asked in ((tiny_tokenizer, False), (tiny_chat_tokenizer, True), (None, False)):
        given = {"processing_class": tokenizer}
        assert make(tiny_model("llama"), tmp_path, given=given).reads_own_answers == asked


def test_answers_are_no_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_answers, "seconds_per_token", lambda *_: 0.5)
    found = [own_answers.seconds_to_answer(None, length) for length in (16, 1024)]
    assert found == [8, own_answers.TOKENS / 2]
