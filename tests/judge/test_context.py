"""Copying, by models that answer by a rule; tokens that need context, token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nuteprune.data.tokens import bos_of
from nuteprune.judge import context as module
from nuteprune.judge.context import (
    LENGTH,
    SEED,
    SEQUENCES,
    SPANS,
    Span,
    copying,
    cut_blocks,
    draw,
    judge_context,
    ordinary_ids,
    windows,
)
from nuteprune.model.forwards import cache_name

TOKENS = SEQUENCES * LENGTH


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
    # Of published texts the first block alone has it; the others get it too.
    assert with_bos.tolist() == [[*range(20)], [0, *range(25, 44)]]
    put = cut_blocks([text[1] + 1], span, [0], most=4)
    assert put.tolist() == [[0, *range(1, 20)], [0, *range(20, 39)]]
    assert cut_blocks([], span, most=4).shape == (0, 20)
    many = cut_blocks([torch.arange(20)[None] + i for i in range(7)], span, most=4)
    assert many[:, 0].tolist() == [0, 1, 2, 3]  # more sources than blocks


class Known(nn.Module):
    """Answers by a rule: `rule(ids_BT)` gives the likeliest next token after each token."""

    def __init__(self, like: Any, rule: Any, positions: int | None = 4096) -> None:
        super().__init__()
        self.inner, self.rule, self.seen = like, rule, []
        self.config = SimpleNamespace(max_position_embeddings=positions)
        self.device = torch.device("cpu")

    def get_input_embeddings(self) -> nn.Module:
        return nn.Embedding(300, 1)

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()

    def forward(self, input_ids: Tensor, logits_to_keep: int, **_: Any) -> Any:
        assert not self.training
        self.seen.append(input_ids)
        next_BT = self.rule(input_ids)
        return SimpleNamespace(logits=nn.functional.one_hot(next_BT, 300)[:, -logits_to_keep:])


@pytest.fixture
def measure(tiny_tokenizer) -> Any:
    def run(rule: Any, tokenizer: Any = tiny_tokenizer, **how: Any) -> Any:
        positions = how.pop("positions", 4096)
        model = Known(None, rule, positions)
        return copying(model, tokenizer, **how), torch.cat(model.seen)  # type: ignore[arg-type]

    return run


def induction(ids_BT: Tensor) -> Tensor:
    """What came after the last earlier place of the same two tokens, else of the same token.

    Of what is behind a token, its answer knows nothing.
    """
    answers = torch.zeros_like(ids_BT)
    for row, ids in enumerate(ids_BT.tolist()):
        last: dict[tuple[int, ...], int] = {}
        for at, token in enumerate(ids):
            pair = (ids[at - 1], token) if at else ()
            chosen = last.get(pair, last.get((token,)))
            answers[row, at] = 0 if chosen is None else ids[chosen + 1]
            last[pair] = last[(token,)] = at
    return answers


def test_a_model_that_knows_the_sequence_has_all_and_one_that_guesses_has_none(measure) -> None:
    def perfect(ids_BT: Tensor) -> Tensor:
        return ids_BT.roll(-1, dims=1)

    found, _ = measure(perfect)
    assert (found.percent, found.protocol["tokens"]) == (100, TOKENS)
    found, _ = measure(torch.zeros_like)
    assert found.percent == 0


def test_only_tokens_of_the_repeat_count_and_each_from_what_is_before_it(measure) -> None:
    found, ids = measure(induction, batch_size=5)
    drawn = ids[:, :LENGTH]
    assert torch.equal(ids, torch.cat([drawn, drawn], dim=1))
    assert ids.shape == (SEQUENCES, 2 * LENGTH)
    right = (induction(ids)[:, LENGTH - 1 : -1] == ids[:, LENGTH:]).sum()
    assert found.percent == pytest.approx(100 * int(right) / TOKENS)
    assert 80 < found.percent < 100  # the repeat's first token is anybody's guess


def test_the_share_is_of_the_models_own_logits(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model("llama", vocab_size=300).train()
    found = copying(model, tiny_tokenizer, seed=3, batch_size=7)
    assert model.training
    assert found.protocol["length"] == 32  # 64 positions
    ids = ordinary_ids(tiny_tokenizer, 300)
    drawn = draw(ids, 32, 3)
    with torch.no_grad():
        likeliest = model.eval()(torch.cat([drawn, drawn], 1)).logits.argmax(-1)
    right = (likeliest[:, 31:-1] == drawn).sum()
    assert found.percent == pytest.approx(100 * int(right) / drawn.numel())
    assert found == copying(model, tiny_tokenizer, seed=3, batch_size=32)


def test_the_figure_is_that_of_writing_token_by_token(tiny_model, tiny_tokenizer) -> None:
    model, seen = tiny_model("llama", vocab_size=20), []  # so few tokens that guesses are right
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    found = copying(model, tiny_tokenizer)
    hook.remove()
    ids_NT, cached, right, count = torch.cat(seen), {}, 0, 0
    first = ids_NT.shape[1] // 2
    for at in range(ids_NT.shape[1] - 1):
        with torch.no_grad():
            output = model(input_ids=ids_NT[:, at : at + 1], use_cache=True, **cached)
        cached = {(key := cache_name(output)): output[key]}
        if at + 1 >= first:
            assert torch.equal(ids_NT[:, at + 1], ids_NT[:, at + 1 - first])
            right += int((output.logits[:, 0].argmax(-1) == ids_NT[:, at + 1]).sum())
            count += len(ids_NT)
    assert (count, found.percent) == (found.protocol["tokens"], pytest.approx(100 * right / count))
    assert right > 10


def test_texts_begin_with_bos_where_the_tokenizer_has_it(measure, tiny_tokenizer) -> None:
    from tokenizers import processors

    with_bos = type(tiny_tokenizer)(
        tokenizer_object=type(tiny_tokenizer.backend_tokenizer).from_str(
            tiny_tokenizer.backend_tokenizer.to_str()
        ),
        bos_token="<s>",
    )
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_bos.bos_token_id)]
    )
    assert bos_of(with_bos) == [with_bos.bos_token_id]
    found, ids = measure(torch.zeros_like, with_bos, positions=81)
    assert found.protocol["bos"]
    assert found.protocol["length"] == 40
    assert ids.shape == (SEQUENCES, 81)
    assert set(ids[:, 0].tolist()) == {with_bos.bos_token_id}
    assert torch.equal(ids[:, 1:41], ids[:, 41:])


class Words:
    """A tokenizer as far as ids go."""

    def __init__(self, size: int, special: list[int], added: list[int]) -> None:
        self.size, self.all_special_ids = size, special
        self.added = {str(x): x for x in added}

    def __len__(self) -> int:
        return self.size

    def get_added_vocab(self) -> dict[str, int]:
        return self.added


def test_ids_are_those_in_the_middle_of_any_vocabulary() -> None:
    ids = ordinary_ids(Words(49_152, [0, 1, 2], []), 49_152)  # type: ignore[arg-type]
    assert (int(ids.min()), int(ids.max()), len(ids)) == (1000, 39_999, 39_000)
    apart = ordinary_ids(Words(49_152, [1000], [39_999, 20_000]), 50_000)  # type: ignore[arg-type]
    assert (int(apart.min()), int(apart.max()), len(apart)) == (1001, 39_998, 38_997)
    assert not {1000, 20_000, 39_999} & set(apart.tolist())
    # The model's embedding may have fewer rows than the tokenizer has ids.
    assert int(ordinary_ids(Words(49_152, [], []), 4_000).max()) < 4_000  # type: ignore[arg-type]
    assert not len(ordinary_ids(Words(2, [0], [1]), 2))  # type: ignore[arg-type]


def test_what_is_reported_was_chosen_by_other_seeds(measure) -> None:
    assert SEED not in range(10)
    _, reported = measure(torch.zeros_like)
    _, again = measure(torch.zeros_like)
    assert torch.equal(reported, again)
    for seed in range(10):
        found, chosen = measure(torch.zeros_like, seed=seed)
        assert found.protocol["seed"] == seed
        assert not torch.equal(reported, chosen)


def test_where_there_is_no_room_or_no_ordinary_id_nothing_is_said(
    tiny_tokenizer, tiny_model
) -> None:
    model = Known(None, torch.zeros_like, positions=1)
    assert copying(model, tiny_tokenizer) is None  # type: ignore[arg-type]
    few: Any = Words(2, [0], [1])
    few.bos_token_id = None
    assert copying(tiny_model("llama"), few) is None
