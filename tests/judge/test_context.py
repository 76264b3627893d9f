"""Tokens that need their context, compared with passes token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nuteprune.judge import context as module
from nuteprune.judge.context import SPANS, Span, cut_blocks, judge_context, windows


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SCORED": 12, "TOGETHER": 4, "NEEDS": 0.2}.items():
        monkeypatch.setattr(module, name, value)


def test_spans_are_those_that_are_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [(x.length, x.far, x.near) for x in SPANS] == [(256, 128, 16), (1152, 1024, 128)]
    found = windows(torch.arange(256)[None], 16)
    assert found.shape == (16, 24)
    assert found[:, -8:].flatten().tolist() == [*range(128, 256)]


@pytest.mark.parametrize("bos", [[], [9]])
def test_windows_are_stretches_of_their_block_after_bos(bos: list[int]) -> None:
    blocks = torch.stack([torch.arange(20), torch.arange(100, 120)])
    found = windows(blocks, 3, bos).tolist()
    rows = [range(5, 12), range(9, 16), range(13, 20), range(105, 112), range(109, 116)]
    assert found[:5] == [[*bos, *row] for row in rows]
    assert len(found) == 6


@torch.no_grad()
def chance(model, ids: Tensor) -> float:
    return float(model(ids[None]).logits[0, -2].log_softmax(-1)[ids[-1]])


@pytest.mark.parametrize("bos", [[], [9]])
def test_figures_are_those_of_single_tokens(bos: list[int], tiny_model) -> None:
    dense, pruned = tiny_model("llama"), tiny_model("llama_mha")
    span = Span(8, 3)
    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(10, 96, (5, span.length), generator=random)
    start = torch.tensor(bos, dtype=torch.long)
    blocks[:, : len(bos)] = start
    rows = []
    for row in blocks:
        for at in range(8, 20):
            first = at - 3 - (at - 8) % 4  # of its window
            short = torch.cat([start, row[first : at + 1]])
            rows.append(
                [
                    *(chance(x, row[: at + 1]) for x in (dense, pruned)),
                    *(chance(x, short) for x in (dense, pruned)),
                ]
            )
    whole, left, short, own = torch.tensor(rows).unbind(1)
    needs = whole - short > 0.2
    assert 5 < needs.sum() < 55
    found = judge_context(dense, pruned, blocks, span, bos, batch_size=2)
    gains = float((whole - short)[needs].mean()), float((left - own)[needs].mean())
    wanted = {
        "lost": float((whole - left)[needs].mean()),
        "lost_elsewhere": float((whole - left)[~needs].mean()),
        "kept": 100 * gains[1] / gains[0],
    }
    assert {x: found[x] for x in wanted} == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert [*found["gain"].values()] == pytest.approx(gains, rel=1e-3, abs=1e-5)
    assert (found["tokens"], found["needing"]) == (60, int(needs.sum()))
    how = found["protocol"]
    assert how["blocks"] == 5
    assert "0.2 nats" in how["measures"]["needing"]
    assert "8 to 19 tokens before them than given the last 3 to 6 (4" in how["measures"]["needing"]
    itself = judge_context(dense, dense, blocks, span, bos)
    assert (itself["lost"], itself["kept"]) == pytest.approx((0, 100), abs=1e-3)


def test_where_no_token_needs_it_nothing_is_said(
    tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NEEDS", 1e9)
    model, blocks = tiny_model("llama"), torch.arange(20)[None]
    found = judge_context(model, model, blocks, Span(8, 3))
    assert (found["needing"], found["lost"], found["kept"]) == (0, None, None)
    assert found["gain"] == {"before": None, "after": None}
    assert found["lost_elsewhere"] == 0
    monkeypatch.setattr(module, "NEEDS", -1e9)
    assert judge_context(model, model, blocks, Span(8, 3))["lost_elsewhere"] is None


def test_blocks_are_cut_evenly_from_sources_that_are_long_enough() -> None:
    span = Span(8, 3)  # 20 tokens
    text = [
        torch.arange(50).view(2, 25),
        torch.arange(38).view(2, 19),
        torch.arange(60).view(3, 20),
    ]
    found = cut_blocks(text, span, most=5)
    assert found.tolist() == [[*range(20)], [*range(25, 45)], [*range(20)], [*range(20, 40)]]
    with_bos = cut_blocks([text[1], text[0]], span, [0], most=4)
    # The first row of each has it; that a source has it is told by its first block.
    assert with_bos.tolist() == [[*range(20)], [*range(25, 45)]]
    put = cut_blocks([text[1] + 1], span, [0], most=4)
    assert put.tolist() == [[0, *range(1, 20)], [0, *range(20, 39)]]
    assert cut_blocks([], span, most=4).shape == (0, 20)
