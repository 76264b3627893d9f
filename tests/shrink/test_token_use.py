"""How often tokens will be used: against softmax written out, and by what each sign says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from nuteprune.model.anatomy import Anatomy
from nuteprune.shrink import token_use
from nuteprune.shrink.token_use import Windows, expected_use, use_of
from nuteprune.shrink.vocabulary import Merges
from tests.shrink.test_vocabulary import gemma


def test_what_a_model_expects_is_its_mean_probability(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", vocab_size=40)
    texts = [[5, 6, 7], [8, 9], [10, 11]]
    monkeypatch.setattr(token_use, "POSITIONS", 7)  # with what they begin with, the first two
    expected_V, flat_V = expected_use(Anatomy(model), texts, [1])
    rows = [torch.tensor([[1, *ids]]) for ids in texts[:2]]
    with torch.no_grad():
        logits = torch.cat([model(x).logits[0] for x in rows])
    torch.testing.assert_close(expected_V, logits.softmax(-1).mean(0))
    torch.testing.assert_close(flat_V, (logits / 2).softmax(-1).mean(0))


def test_windows_are_of_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_use, "POSITIONS", 200)
    windows = Windows(4)
    for number in range(1000):
        windows.add([number] * (number % 9))
    assert len(windows.texts) == 50
    assert all(0 < len(x) <= 4 for x in windows.texts)
    numbers = sorted(x[0] for x in windows.texts)
    assert numbers[25] == pytest.approx(500, abs=200)


def test_what_the_text_shows_and_what_the_model_knows_share_the_use() -> None:
    full = gemma()
    merges, size = Merges(json.loads(full.to_str())), full.get_vocab_size()
    counted_V, flat_V = torch.zeros(size), torch.full((size,), 1.0 / size)
    shown = full.encode("the teacher", add_special_tokens=False).ids
    counted_V[shown] = 1
    use = torch.tensor(use_of(merges, counted_V, flat_V, flat_V, 0.0))
    assert set(use.topk(len(set(shown))).indices.tolist()) == set(shown)
    use = torch.tensor(use_of(merges, counted_V, counted_V, flat_V, 1.0))
    assert use.sum() == pytest.approx(1)
    names = {i: x for x, i in merges.ids.items() if x not in merges.added}
    known = set("".join(names[i] for i in shown))
    near = [i for i in names if set(names[i]) <= known]
    far = next(i for i in names if i > near[0] and not set(names[i]) <= known)
    forms = {names[i].lstrip("▁").lower() for i in shown}
    plain = [i for i in near if names[i].lstrip("▁").lower() not in forms]
    assert [use[i] for i in plain] == sorted((use[i] for i in plain), reverse=True)  # by the order
    assert use[far] / use[plain[0]] == pytest.approx(0.02 * ((plain[0] + 1) / (far + 1)) ** 0.5)


def test_other_forms_of_the_texts_words_are_known() -> None:
    full = gemma()
    merges, size = Merges(json.loads(full.to_str())), full.get_vocab_size()
    ids = merges.ids
    pairs = [(x, x[1:]) for x in ids if x.startswith("▁") and len(x) > 3 and x[1:] in ids]
    shown, form = pairs[-1]
    counted_V, flat_V = torch.zeros(size), torch.full((size,), 1.0 / size)
    counted_V[ids[shown]] = 1
    use = use_of(merges, counted_V, counted_V, flat_V, 0.5)
    others = [use[i] for i in ids.values() if i > ids[form] and i != ids[shown]]
    assert use[ids[form]] > 5 * max(others)
