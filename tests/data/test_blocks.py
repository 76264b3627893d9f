from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nuteprune.data import demo as assets
from nuteprune.data import training_text as data
from nuteprune.data.held_out import held_out_blocks
from nuteprune.data.readers import shuffled
from nuteprune.data.specs import iter_documents
from nuteprune.data.training_text import BlockDataset, training_blocks, turns
from nuteprune.errors import UserError

from .conftest import WORDS, make_tokenizer, words, write_text

WRITTEN = [[1500 + 3 * i, 1501 + 3 * i, WORDS + 1] for i in range(100)]


def many() -> list[str]:
    """Short documents, some of which are held out."""
    return [words(10 * i, 10) for i in range(200)]


class TestBlocks:
    def test_shapes_and_labels(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        spec = write_text(tmp_path, many())
        blocks = training_blocks(spec, tokenizer, length=16, count=10, seed=0)
        assert isinstance(blocks, BlockDataset)
        assert len(blocks) == len(list(blocks)) == 10
        assert blocks[0].keys() == {"input_ids", "labels"}
        assert blocks[3]["input_ids"].shape == (16,)
        assert blocks[3]["input_ids"].dtype == torch.long
        assert torch.equal(blocks[3]["input_ids"], blocks[3]["labels"])
        (held_out,) = held_out_blocks(spec, tokenizer, length=16, count=5).values()
        assert held_out.shape == (5, 16)
        assert held_out.dtype == torch.long

    @pytest.mark.parametrize(
        ("special", "end"),
        [
            ({"bos_token": "<s>", "eos_token": "</s>"}, [WORDS + 2]),
            ({"bos_token": "<s>"}, [WORDS + 1]),
            ({}, []),
        ],
    )
    def test_documents_are_joined_by_eos_or_bos_or_nothing(
        self, tmp_path: Path, special: dict[str, str], end: list[int]
    ) -> None:
        spec = write_text(tmp_path, ["w0 w1", "w5 w6"])
        cycle = [0, 1, *end, 5, 6, *end]
        blocks = training_blocks(spec, make_tokenizer(**special), length=4, count=1, seed=0)
        ids = blocks[0]["input_ids"].tolist()
        assert ids in [(cycle * 2)[i : i + 4] for i in (0, 2 + len(end))]

    def test_each_block_begins_as_the_tokenizer_begins_a_text(self, tmp_path: Path) -> None:
        first = make_tokenizer(eos_token="</s>", bos_token="<s>")
        plain = make_tokenizer(eos_token="</s>")
        bos = first.bos_token_id
        first._tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
        spec = write_text(tmp_path, many())
        blocks = training_blocks(spec, first, length=16, count=10, seed=0).blocks
        assert (blocks[:, 0] == bos).all()
        assert not (blocks[:, 1:] == bos).any()
        cut = training_blocks(spec, plain, length=15, count=10, seed=0).blocks
        assert torch.equal(blocks[:, 1:], cut)
        (held_out,) = held_out_blocks(spec, first, length=8, count=3).values()
        assert held_out.shape[1] == 8
        assert (held_out[:, 0] == bos).all()
        (bare,) = held_out_blocks(spec, plain, length=7, count=3).values()
        assert torch.equal(held_out[:, 1:], bare)

    def test_sources_take_turns(
        self, demo: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        blocks = training_blocks("demo", tokenizer, length=8, count=20, seed=0)
        sources = [int(x["input_ids"][x["input_ids"] < WORDS][0]) // 600 for x in blocks]
        assert sources == [i % 3 for i in range(20)]

    def test_seeds_draw_the_text(
        self, demo: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        def draw(seed: int) -> torch.Tensor:
            return training_blocks("demo", tokenizer, length=8, count=6, seed=seed).blocks

        assert torch.equal(draw(3), draw(3))
        assert set(draw(3).flatten().tolist()) != set(draw(4).flatten().tolist())

    def test_a_few_blocks_come_from_all_over_a_long_document(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        spec = write_text(tmp_path, [words(0, 1500)])
        drawn = training_blocks(spec, tokenizer, length=8, count=20, seed=0).blocks
        ids = drawn[drawn < WORDS]
        assert [int(((ids >= x) & (ids < x + 500)).sum() > 0) for x in (0, 500, 1000)] == [1, 1, 1]
        runs = (drawn[:, 1:] == drawn[:, :-1] + 1).float().mean()
        assert runs > 0.8  # in passages, not word by word

    def test_held_out_text_is_never_trained_on(
        self, demo: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        blocks = training_blocks("demo", tokenizer, length=16, count=500, seed=0)
        trained = set(blocks.blocks.flatten().tolist())
        held_out = held_out_blocks("demo", tokenizer, length=8, count=100)
        assert list(held_out) == list(demo)
        held = set(torch.cat(list(held_out.values())).flatten().tolist())
        assert trained & held <= {tokenizer.eos_token_id}
        assert len(trained | held) > 0.95 * 1800

    def test_short_text_is_cycled(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        spec = write_text(tmp_path, [words(0, 40)])
        blocks = training_blocks(spec, tokenizer, length=16, count=50, seed=0)
        assert len(blocks) == 50
        assert set(blocks.blocks.flatten().tolist()) == {*range(40), WORDS + 1}

    def test_fewer_blocks_than_sources(
        self, demo: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        assert len(training_blocks("demo", tokenizer, length=8, count=1, seed=0)) == 1

    def test_text_shorter_than_a_block(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        spec = write_text(tmp_path, [words(0, 40)])
        with pytest.raises(UserError, match=r"training part.: 41 tokens, and a block takes 64; pa"):
            training_blocks(spec, tokenizer, length=64, count=1, seed=0)
        with pytest.raises(
            UserError, match=r"held-out part, about 5 %.: 0 tokens, .*64; pass .*--eval-data"
        ):
            held_out_blocks(spec, tokenizer, length=64, count=1)

    @pytest.mark.parametrize(("length", "count"), [(1, 1), (8, 0), (-1, 1)])
    def test_sizes_that_make_no_block(
        self,
        demo: dict[str, list[str]],
        tokenizer: PreTrainedTokenizerFast,
        length: int,
        count: int,
    ) -> None:
        for make in (lambda **x: training_blocks(seed=0, **x), held_out_blocks):
            with pytest.raises(UserError, match="pass at least 1 block of at least 2"):
                make(spec="demo", tokenizer=tokenizer, length=length, count=count)

    def test_ids_must_be_known_to_the_model(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        spec = write_text(tmp_path, many())
        highest = WORDS + 1
        makers: list[Callable[..., object]] = [
            lambda **x: training_blocks(spec, tokenizer, length=8, count=90, seed=0, **x),
            lambda **x: held_out_blocks(spec, tokenizer, length=20, count=1, **x),
        ]
        for make in makers:
            make(vocab_size=highest + 1)
            with pytest.raises(UserError, match=f"token id {highest}, but the model knows"):
                make(vocab_size=highest)

    def test_a_spec_alone_gives_the_blocks_of_version_0_1_0(
        self, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        texts = {
            name: [words(start + 7 * i, 5 + i % 40) for i in range(300)]
            for name, start in [("wikipedia", 0), ("speeches", 600), ("recipes", 1200)]
        }
        monkeypatch.setattr(assets, "documents", lambda **_: texts)
        options: dict[str, Any] = {"length": 16, "count": 100, "seed": 7}
        for spec in ("demo", ["demo"]):
            blocks = training_blocks(spec, tokenizer, **options).blocks
            assert blocks.dtype == torch.int32
            # Of the code at that version, on these very texts.
            found = hashlib.sha256(blocks.numpy().tobytes()).hexdigest()
            assert found.startswith("4530616d2f7cdef9")


class TestShares:
    def test_specs_have_their_shares_and_sources_equal_turns(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        texts = {"one": [words(0, 400)], "two": [words(400, 400)]}
        monkeypatch.setattr(assets, "documents", lambda **_: texts)
        spec = write_text(tmp_path, [words(800, 400)])
        blocks = training_blocks(
            ["demo", spec, "self"],
            tokenizer,
            length=8,
            count=80,
            seed=0,
            shares=[0.5, 0.25, 0.25],
            written=WRITTEN,
        ).blocks
        whose = [min(int(x[x < WORDS].min()) // 400, 3) for x in blocks]
        assert [whose.count(i) for i in range(4)] == [20, 20, 20, 20]
        for start in range(0, 80, 4):  # in any run of blocks, as near as can be
            assert sorted(i > 1 for i in whose[start : start + 4]) == [False, False, True, True]
        assert [i for i in whose if i < 2] == [0, 1] * 20
        equal = training_blocks(
            ["self", spec], tokenizer, length=8, count=9, seed=0, written=WRITTEN
        ).blocks
        assert [bool((x >= 1500).any()) for x in equal[:, :1]] == [True, False] * 4 + [True]

    def test_what_the_model_wrote_is_read_once_before_any_of_it_again(
        self, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data, "REPEATS", 1000)

        def draw(count: int, seed: int = 0) -> list[int]:
            found = training_blocks(
                "self", tokenizer, length=10, count=count, seed=seed, written=WRITTEN
            )
            return sorted(found.blocks.flatten().tolist())

        assert draw(30) == sorted(x for text in WRITTEN for x in text)
        assert draw(60) == sorted(x for text in WRITTEN for x in text * 2)
        assert draw(10) == draw(10) != draw(10, seed=1)

    @pytest.mark.parametrize("length", [8, 9])
    def test_one_of_five_blocks_of_the_models_own_comes_twice_and_nothing_is_written_in_vain(
        self, length: int, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        written = WRITTEN[: 9 * length]  # 27 blocks, of 3 tokens a text
        found = training_blocks(
            "self", tokenizer, length=length, count=33, seed=0, written=written
        ).blocks
        again = -(-length // 2)
        twice = [torch.equal(x[again:], x[: length - again]) for x in found]
        assert sum(twice) == 6
        once = [
            i for x, comes_again in zip(found, twice, strict=True) if not comes_again for i in x
        ]
        assert sorted(map(int, once)) == sorted(i for text in written for i in text)
        repeated = {tuple(x.tolist()) for x in found[torch.tensor(twice)]}
        assert {i for x in repeated for i in x} <= {i for text in written for i in text}
        assert len(repeated) == 6

    def test_the_model_has_to_write_enough(self, tokenizer: PreTrainedTokenizerFast) -> None:
        for written in ([], WRITTEN[:2]):
            with pytest.raises(UserError, match=r"self \(what .* written\): [06] tokens"):
                training_blocks("self", tokenizer, length=8, count=1, seed=0, written=written)

    def test_a_share_may_be_less_than_a_block(
        self, demo: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        how = {"length": 8, "count": 4, "seed": 0}
        both = training_blocks(
            ["demo", "self"], tokenizer, shares=[1000, 1], written=WRITTEN, **how
        )
        assert torch.equal(both.blocks, training_blocks("demo", tokenizer, **how).blocks)

    @pytest.mark.parametrize(
        ("specs", "shares"),
        [(["demo"], [0.5, 0.5]), (["demo", "self"], [1]), (["demo", "self"], [1, 0]), ([], None)]
        + [(["demo", "self"], [1, x]) for x in (-1, float("nan"), float("inf"))],
    )
    def test_shares_that_are_none(
        self,
        specs: list[str],
        shares: list[float] | None,
        demo: dict[str, list[str]],
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        with pytest.raises(UserError, match="pass one number above 0 for each"):
            training_blocks(specs, tokenizer, length=8, count=4, seed=0, shares=shares)

    @given(
        st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5),
        st.integers(1, 200),
        st.floats(1e-3, 1e3),
    )
    def test_at_any_time_each_has_had_about_its_share(
        self, shares: list[float], count: int, unit: float
    ) -> None:
        found = turns([unit * share for share in shares], count)
        for index, share in enumerate(shares):
            exact = np.arange(1, count + 1) * share / sum(shares)
            had = np.cumsum(np.array(found) == index)
            assert (had - exact < 1 + 1e-6).all()
            assert (exact - had < len(shares)).all()
        assert len(found) == count

    def test_a_large_source_is_shuffled_and_read_whole(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data, "_SHUFFLE_CHARS", 50)
        texts = [f"text {i}" for i in range(200)]
        found = list(shuffled(texts, random.Random(0), data._SHUFFLE_CHARS, len))
        assert sorted(found) == sorted(texts)
        assert found != texts

    def test_held_out_text_of_several_specs_judges_and_demos_where_all_is_self_written(
        self, tmp_path: Path, demo: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (tmp_path / "other").mkdir()
        one = write_text(tmp_path, many())
        two = write_text(tmp_path, [words(5 * i, 10) for i in range(300)], "other/a.txt")

        def judged(spec: str | list[str]) -> dict[str, list[list[int]]]:
            found = held_out_blocks(spec, tokenizer, length=8, count=2)
            return {name: blocks.tolist() for name, blocks in found.items()}

        assert judged([one, "self", two]) == judged(one) | {two: judged(two)["a.txt"]}
        assert judged("self") == judged(["self"]) == judged("demo")
        with pytest.raises(UserError, match="text that the model writes"):
            iter_documents("self")
