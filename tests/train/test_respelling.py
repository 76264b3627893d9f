"""Learning to spell: what is wanted, reckoned word by word, and what it changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from nuteprune.export.vocabulary import cut_model, cut_tokenizer_of, merges_of
from nuteprune.model.anatomy import Anatomy
from nuteprune.shrink.vocabulary import choose
from nuteprune.train.respelling import alternating, heal, loss_of, respelled, spellings
from tests.shrink.test_vocabulary import corpus, counted, gemma, qwen


class Case:
    """A tiny model, the same with fewer tokens, and how these spell."""

    def __init__(self, tiny_model: Any, make: Callable[[], Any]) -> None:
        full = make()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=full)
        self.size = full.get_vocab_size()
        self.model = tiny_model("llama", vocab_size=self.size, tie_word_embeddings=True)
        merges = merges_of(self.tokenizer)
        self.kept = choose(merges, counted(full, corpus()[1]), self.size * 2 // 3)
        self.smaller = cut_tokenizer_of(self.tokenizer, merges, self.kept, "llama")
        self.small = cut_model(Anatomy(self.model), self.kept)
        self.how = spellings(merges, self.smaller, self.size)
        self.merges = merges

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found


@pytest.mark.parametrize("make", [qwen, gemma])
def test_tokens_are_spelled_as_the_smaller_tokenizer_does(
    tiny_model: Any, make: Callable[[], Any]
) -> None:
    case = Case(tiny_model, make)
    new = {old: i for i, old in enumerate(case.kept)}
    assert all(case.how[old] == (new[old],) for old in case.kept)
    gone = [i for i in range(case.size) if i not in new]
    assert all(len(case.how[i]) > 1 for i in gone)
    names = {i: x for x, i in case.merges.all_ids.items()}
    token = {i: x for x, i in case.smaller.get_vocab().items()}
    spelled = ["".join(token[i] for i in case.how[old]) for old in gone]
    assert [x for x in spelled if "<0x" not in x] == [
        names[i] for i, x in zip(gone, spelled, strict=True) if "<0x" not in x
    ]
    words = "the teacher is less pruned, and students learn"
    text = respelled(case.ids(words), [case.kept[0]], case.how)
    if text is not None and make is qwen:  # its words are split before they are merged
        assert text.parts[1:] == case.smaller(words, add_special_tokens=False).input_ids


def test_what_is_wanted_is_what_the_words_of_a_part_add_up_to(tiny_model: Any) -> None:
    case = Case(tiny_model, qwen)
    first_V = torch.tensor([x[0] for x in case.how])
    gone = next(i for i, x in enumerate(case.how) if len(x) == 3)
    ids = [case.kept[300], case.kept[301], gone, case.kept[302]]
    text = respelled(ids, [case.kept[5]], case.how)
    assert text is not None
    assert (text.ends, text.within) == ([0, 1, 2, 5], [3, 4])
    found = loss_of(case.model, case.small, text, first_V, len(case.kept))
    with torch.no_grad():
        teacher = case.model(torch.tensor([text.whole])).logits[0].softmax(-1)
        student = case.small(torch.tensor([text.parts])).logits[0].log_softmax(-1)
    expected = 0.0
    for place, end in enumerate(text.ends):
        wanted = [0.0] * len(case.kept)
        for token, chance in enumerate(teacher[place].tolist()):
            wanted[case.how[token][0]] += chance
        expected += sum(
            p * (torch.tensor(p).log().item() - float(student[end, i]))
            for i, p in enumerate(wanted)
            if p
        )
    expected -= sum(float(student[i, text.parts[i + 1]]) for i in text.within)
    assert float(found.detach()) == pytest.approx(expected / 6, rel=1e-3)


def test_texts_of_either_kind_are_read_in_turns_and_others_left(tiny_model: Any) -> None:
    case = Case(tiny_model, qwen)
    plain = case.kept[300:310]
    gone = [i for i, x in enumerate(case.how) if len(x) > 1]
    rich, poor = [*plain, gone[0], gone[1]], [*plain, gone[2]]
    foreign = gone[:9]
    read = alternating([poor, plain, rich], [poor, foreign], [case.kept[5]], case.how, 8)
    assert [x.whole[1:] for x in read] == [rich, poor, poor]
    assert len(alternating([poor] * 9, [rich] * 9, [case.kept[5]], case.how, 4)) == 4


def test_it_learns_to_spell_and_the_teacher_stays(tiny_model: Any) -> None:
    case = Case(tiny_model, qwen)
    before = {k: x.clone() for k, x in case.model.state_dict().items()}
    ids = case.ids(json.dumps(corpus()[4])[:2000])
    texts = [ids[i : i + 24] for i in range(0, len(ids), 24)]
    lessons = [x for t in texts if (x := respelled(t, [case.kept[5]], case.how))]
    assert len(lessons) > 3
    first_V = torch.tensor([x[0] if x else 0 for x in case.how])

    def loss(model: Any) -> float:
        with torch.no_grad():
            losses = [loss_of(case.model, model, x, first_V, len(case.kept)) for x in lessons]
        return sum(map(float, losses)) / len(losses)

    told: list[tuple[Any, ...]] = []
    unhealed = loss(case.small)
    healed = heal(case.model, case.small, lessons, case.how, 40, lambda *x: told.append(x))
    assert type(healed) is type(case.model)
    assert loss(healed) < unhealed - 0.05
    assert told[-1] == ("learning to spell", 40, 40)
    assert all(torch.equal(x, before[k]) for k, x in case.model.state_dict().items())
    assert torch.equal(
        healed.get_input_embeddings().weight, before["model.embed_tokens.weight"][case.kept]
    )
