"""What a model writes itself, compared with draws from the stock model run on whole sequences."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nuteprune.data import decoding
from nuteprune.data.decoding import draw
from nuteprune.data.tokens import TEMPERATURE, Openings, openings
from nuteprune.errors import RunFailed, UserError
from nuteprune.run_folder import SELF_WRITTEN
from nuteprune.stages import write as stage
from tests.forked import Forked, ranks

pytestmark = pytest.mark.slow

CHAT = (
    "<s>{% for m in messages %}{{ m.role[0] }}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
LENGTH, SHORT = 24, 10
VOCABULARY = 320  # beyond what the tokenizer knows


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "TEXT_TOKENS", SHORT)


@pytest.fixture
def tokenizer(tiny_tokenizer) -> PreTrainedTokenizerFast:
    return copy(tiny_tokenizer)


def copy(tokenizer: PreTrainedTokenizerFast, template: str | None = None, **changes: Any) -> Any:
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | changes
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{name: token for name, token in tokens.items() if token},
    )
    made.chat_template = template
    return made


@pytest.fixture
def model(tiny_model) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=VOCABULARY)


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, **changes: Any) -> list[list[int]]:
    options: dict[str, Any] = {"tokens": 300, "length": LENGTH, "seed": 3, "folder": folder}
    return stage.write(model, tokenizer, **options | changes)


def expected(
    model: PreTrainedModel,
    opening: Openings,
    numbers: np.ndarray,
    number: int | None,
    most: int,
    written: list[int],
) -> list[int]:
    """One text, each token drawn by the stock model from the whole text before it, no cache.

    Up to the first token that is not the written one: what the model gives for all beginnings of
    what is written, one pass tells.
    """
    asks = number is None
    ids = list(opening.asks if number is None else opening.given(number))
    context = torch.tensor([[*opening.start, *written]])
    with torch.no_grad():
        logits_TV = model(input_ids=context, use_cache=False).logits[0]
    while len(ids) < most and ids == written[: len(ids)]:
        # The draws begin with the position that the first token of all is fed at.
        at = len(opening.start) + len(ids) - 1
        chances = torch.softmax(logits_TV[at, : opening.known].double(), 0).numpy()
        drawn = numbers[at] * chances.sum()
        token = int(np.searchsorted(np.cumsum(chances), drawn, side="right"))
        if asks and token in opening.asked:
            asks = False
            ids += opening.answers
            continue
        ids.append(token)
        if token in opening.ends:
            break
    return ids[:most]


def numbers_of(seed: int, batch: int, size: int, most: int) -> np.ndarray:
    """(positions, texts)"""
    draws = random.Random(f"{seed} {batch}").getrandbits(63)
    generator = torch.Generator().manual_seed(draws)
    rows = [torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(most + 1)]
    return torch.stack(rows).numpy()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SELF_WRITTEN).read_text().splitlines()]


def check(model: PreTrainedModel, tokenizer: Any, folder: Path) -> list[list[int]]:
    """Compare what is written with draws from whole sequences."""
    texts = write(model, tokenizer, folder)
    rows = rows_of(folder)
    assert [row["ids"] for row in rows] == texts
    end = [tokenizer.eos_token_id]
    bos = [] if tokenizer("a").input_ids[0] != tokenizer.bos_token_id else [1]
    most = LENGTH - len(bos) - 1
    opening = openings(model, tokenizer, most=most, seed=3)
    plain = 0
    for batch in range(1 + rows[-1]["batch"]):
        written = [row for row in rows if row["batch"] == batch]
        chats = tuple(written[0]["ids"][: len(opening.asks)]) == opening.asks != ()
        assert chats == (batch == 1 and opening.asks != ())
        assert {row["of"] for row in written} == {len(written)}
        longest = most if chats else SHORT
        numbers = numbers_of(3, batch, len(written), longest)
        for i, row in enumerate(written):
            number = None if chats else plain + i
            found = expected(model, opening, numbers[:, i], number, longest, row["ids"])
            assert row["ids"] == (found if found[-1] in opening.ends else found + end)
        plain += 0 if chats else len(written)
    assert sum(map(len, texts)) >= 300
    return texts


@pytest.mark.parametrize("name", ["gemma2", "opt"])
def test_each_token_is_drawn_from_what_the_stock_model_gives_for_the_text_before_it(
    name: str, tiny_model, tokenizer, tmp_path: Path
) -> None:
    tokenizer.chat_template = None
    check(tiny_model(name, vocab_size=VOCABULARY), tokenizer, tmp_path)


@pytest.mark.slow
def test_every_family_writes(tiny_name: str, tiny_model, tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = CHAT
    check(tiny_model(tiny_name, vocab_size=VOCABULARY), tokenizer, tmp_path)


def test_a_bos_is_before_each_text_where_the_tokenizer_puts_one(model, tokenizer, tmp_path) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT
    opening = openings(model, tokenizer, most=LENGTH - 2, seed=3)
    assert opening.start == (1,)
    assert opening.asks == tuple(tokenizer("u", add_special_tokens=False).input_ids)
    texts = check(model, tokenizer, tmp_path)
    assert max(map(len, texts)) <= LENGTH - 1


def test_texts_begin_as_the_model_would_begin_them_each_with_another_token(
    model, tokenizer
) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # a tiny model takes all tokens for likely
    drawn = [openings(model, tokenizer, most=LENGTH, seed=seed) for seed in range(400)]
    firsts = sorted(drawn[0].firsts)
    assert all(sorted(x.firsts) == firsts for x in drawn)
    logits = model(torch.tensor([drawn[0].start])).logits[0, -1, firsts].detach().double()
    expected = (logits / TEMPERATURE).softmax(-1)
    assert expected.max() > 0.05
    counts = torch.tensor([sum(x.firsts[0] == i for x in drawn) for i in firsts]) / len(drawn)
    assert float((counts - expected).abs().max()) < 0.06
    likely = set(torch.tensor(firsts)[expected.argsort(descending=True)[:20]].tolist())
    assert sum(len(likely.intersection(x.firsts[:20])) for x in drawn) > 2 * len(drawn)


def test_a_tokenizer_without_special_tokens_will_do(model, tiny_tokenizer, tmp_path: Path) -> None:
    bare = copy(tiny_tokenizer, pad_token=None, bos_token=None, eos_token=None)
    model.generation_config.eos_token_id = None
    texts = write(model, bare, tmp_path)
    assert {len(x) for x in texts} == {SHORT}


def test_texts_begin_with_tokens_that_differ_and_have_text(model, tokenizer, tmp_path) -> None:
    texts = write(model, tokenizer, tmp_path, tokens=700)
    firsts = [x[0] for x in texts]
    assert len(set(firsts)) == len(firsts) >= 64
    assert not {*firsts} & {*tokenizer.all_special_ids}
    assert all(x and "\ufffd" not in x for x in tokenizer.batch_decode([[i] for i in firsts]))
    assert max(max(x) for x in texts) < len(tokenizer) < VOCABULARY
    other = write(model, tokenizer, tmp_path / "other", seed=4)
    assert [x[0] for x in other] != firsts[: len(other)]


@pytest.mark.parametrize("template", [None, CHAT])
@pytest.mark.parametrize(("tokens", "batch"), [(300, 64), (300, 4), (20, 64)])
def test_the_time_that_it_takes_is_that_of_whole_texts(
    template: str | None,
    tokens: int,
    batch: int,
    model,
    tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer.chat_template = template
    clock, step = [0.0], decoding._step

    def slow(model: Any, ids: list[int], cache: Any) -> Any:
        clock[0] += 3 + len(ids)
        return step(model, ids, cache)

    monkeypatch.setattr(decoding, "_step", slow)
    monkeypatch.setattr(decoding, "BATCH", batch)
    monkeypatch.setattr(decoding.time, "monotonic", lambda: clock[0])
    told = stage.seconds_to_write(model, tokenizer, tokens=tokens, length=LENGTH)
    monkeypatch.setattr(
        decoding, "draw", lambda logits, _: logits.new_full([len(logits)], 65).long()
    )
    started = clock[0]
    write(model, tokenizer, tmp_path, tokens=tokens)
    assert told == pytest.approx(clock[0] - started, rel=0.1)


def certain(model: PreTrainedModel, follows: dict[int, int]) -> None:
    """Make a model surest of what follows each token, whatever came before."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
        embedding[list(follows), range(len(follows))] = 1.0
        model.model.norm.weight.fill_(1.0)
        head[list(follows.values()), range(len(follows))] = 100.0


def test_a_chat_is_a_question_and_its_answer(model, tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = CHAT
    u, a, x, y = (tokenizer(t, add_special_tokens=False).input_ids[0] for t in "uaxy")
    # A question "x", an answer "y"; both are ended by eos. Any plain text ends at once.
    certain(model, {u: x, x: 2, a: y, y: 2} | dict.fromkeys(range(100, 120), 2))
    texts = write(model, tokenizer, tmp_path)
    rows = rows_of(tmp_path)
    assert [row["ids"] for row in rows] == texts
    chats = [row for row in rows if row["ids"][:2] == [1, u]]
    assert chats == [row for row in rows if row["batch"] == 1] + chats[chats[0]["of"] :]
    assert {(row["text"], *row["ids"]) for row in chats} == {("<s>ux</s>ay", 1, u, x, 2, a, y, 2)}


@pytest.mark.parametrize("tokens", [800, 3000])
def test_a_quarter_of_the_tokens_is_chats(tokens: int, model, tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = CHAT
    texts = write(model, tokenizer, tmp_path, tokens=tokens)
    asks = list(openings(model, tokenizer, most=LENGTH - 1, seed=3).asks)
    chats = [ids for ids in texts if ids[: len(asks)] == asks]
    assert 0.15 < sum(map(len, chats)) / sum(map(len, texts)) < 0.35
    assert max(map(len, chats)) == LENGTH
    assert max(len(ids) for ids in texts if ids not in chats) == SHORT + 1


@pytest.mark.parametrize(("plain", "chat"), [(1, 1), (0.7, 0.95), (0.2, 1), (1, 0.3)])
@pytest.mark.parametrize("tokens", [14_848, 32_768, 163_840])
def test_a_quarter_is_chats_however_many_tokens_are_asked_for(
    tokens: int, plain: float, chat: float, model, tokenizer
) -> None:
    tokenizer.chat_template = CHAT
    opening = openings(model, tokenizer, most=254, seed=0)
    sizes = decoding.BatchSizes.of(opening, tokens, 254, 64)
    written, of_chats, begun = [], 0, []
    while sum(written) < tokens:
        batch, longest = decoding.next_batch(opening, sizes, written)
        chats = longest == 254
        written.append(round(len(batch) * longest * (chat if chats else plain)))
        of_chats += chats * written[-1]
        begun += [] if chats else [x.given[0] for x in batch]
    assert 0.18 < of_chats / sum(written) < 0.32
    assert begun == [opening.given(i)[0] for i in range(len(begun))]


def test_an_answer_that_the_model_begins_itself_is_not_begun_again(
    model, tokenizer, tmp_path: Path
) -> None:
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    opens, closes, x, y = (tokenizer(t, add_special_tokens=False).input_ids[0] for t in "[]xy")
    certain(model, {opens: x, x: closes, closes: y, y: 2})
    write(model, tokenizer, tmp_path)
    chats = [row["ids"] for row in rows_of(tmp_path) if row["batch"] == 1]
    assert chats == [[opens, x, closes, y, 2]] * len(chats) != []


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('system first') }}",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{{ 'long' * 99 }}" + CHAT,
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
def test_without_a_template_that_opens_a_question_all_texts_are_plain(
    template: str, model, tokenizer, tmp_path: Path
) -> None:
    plain = write(model, tokenizer, tmp_path / "plain")
    tokenizer.chat_template = template
    assert write(model, tokenizer, tmp_path / "template") == plain


def test_the_models_own_ends_count_and_eos_closes_what_has_none(
    model, tokenizer, tmp_path: Path
) -> None:
    model.generation_config.eos_token_id = [2, 77]
    opening = openings(model, tokenizer, most=LENGTH, seed=3)
    assert opening.ends == {2, 77}
    texts = write(model, tokenizer, tmp_path, tokens=3000)
    assert {x[-1] for x in texts} == {2, 77}
    assert all(77 not in x[1:-1] for x in texts)


def test_text_begins_after_what_stood_between_documents_in_pretraining(
    model, tokenizer, tmp_path: Path
) -> None:
    """A chat model's eos ends a turn; after it comes the next turn, not a document."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    between = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert between not in (None, tokenizer.eos_token_id)
    opening = openings(model, tokenizer, most=LENGTH, seed=3)
    assert opening.start == (between,)
    assert opening.ends == {tokenizer.eos_token_id, between}
    check(model, tokenizer, tmp_path)


def test_the_model_is_left_as_it_was(model, tokenizer, tmp_path: Path) -> None:
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    write(model, tokenizer, tmp_path)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())


def test_bfloat16_writes_as_well(model, tokenizer, tmp_path: Path) -> None:
    texts = write(model.bfloat16(), tokenizer, tmp_path)
    assert sum(map(len, texts)) >= 300


class TestFile:
    @pytest.fixture(autouse=True)
    def _small_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoding, "BATCH", 4)

    def test_a_whole_one_is_read_and_nothing_written(
        self, model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts = write(model, tokenizer, tmp_path)
        whole = (tmp_path / SELF_WRITTEN).read_bytes()
        monkeypatch.setattr(stage, "write_batch", None)
        assert write(model, tokenizer, tmp_path) == texts
        fewer = write(model, tokenizer, tmp_path, tokens=100)
        assert fewer == texts[: len(fewer)]
        assert len(fewer) < len(texts)
        assert (tmp_path / SELF_WRITTEN).read_bytes() == whole

    @settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(share=st.floats(0, 1), garbage=st.binary(max_size=40))
    def test_what_a_killed_run_left_is_gone_on_with_to_the_same_bytes(
        self, share: float, garbage: bytes, made: tuple[Any, Any, bytes, Path]
    ) -> None:
        model, tokenizer, whole, folder = made
        path = folder / SELF_WRITTEN
        path.write_bytes(whole[: round(share * len(whole))] + garbage)
        write(model, tokenizer, folder)
        assert path.read_bytes() == whole

    @pytest.fixture
    def made(self, model, tokenizer, tmp_path: Path) -> tuple[Any, Any, bytes, Path]:
        write(model, tokenizer, tmp_path)
        return model, tokenizer, (tmp_path / SELF_WRITTEN).read_bytes(), tmp_path

    @pytest.mark.parametrize(
        "change", ["seed", "length", "model", "last layer", "template", "dtype"]
    )
    def test_one_of_another_run_is_not_kept(
        self, change: str, made: tuple[Any, Any, bytes, Path], tiny_model
    ) -> None:
        model, tokenizer, whole, folder = made
        changes: dict[str, Any] = {}
        if change in ("seed", "length"):
            changes = {change: 20}
        elif change == "last layer":  # as of a model that was tuned from the other
            with torch.no_grad():
                model.model.layers[-1].self_attn.v_proj.weight[0] += 1
        elif change == "dtype":
            model.bfloat16()
        elif change == "model":
            with torch.no_grad():
                model.model.embed_tokens.weight[0] += 1
        else:
            tokenizer.chat_template = CHAT
        again = write(model, tokenizer, folder, **changes)
        assert again == write(model, tokenizer, folder / "fresh", **changes)
        assert (folder / SELF_WRITTEN).read_bytes() != whole

    def test_it_is_read_with_another_seed_and_dtype_and_in_one_with_others(
        self, made: tuple[Any, Any, bytes, Path], tmp_path: Path
    ) -> None:
        model, tokenizer, whole, folder = made
        texts = [row["ids"] for row in rows_of(folder)]
        second = write(model.bfloat16(), tokenizer, tmp_path / "2", seed=4, tokens=100)
        both = tmp_path / "both.jsonl"
        both.write_bytes(whole + (tmp_path / "2" / SELF_WRITTEN).read_bytes())
        have = sum(map(len, texts + second))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            read = partial(stage.read_written, both, model.to(dtype), tokenizer)
            assert read(tokens=have) == texts + second
        assert read(tokens=sum(map(len, texts))) == texts
        assert read(tokens=100) == write(model, tokenizer, folder, tokens=100)
        with pytest.raises(UserError, match=f"has {have} tokens, and this run needs {have + 1}:"):
            read(tokens=have + 1)

    @pytest.mark.parametrize("change", ["layer", "embedding", "shape", "eos"])
    def test_that_of_another_model_or_tokenizer_is_not_read(
        self, change: str, made: tuple[Any, Any, bytes, Path]
    ) -> None:
        model, tokenizer, _, folder = made
        what = "tokenizer" if change == "eos" else "model"
        with torch.no_grad():
            if change == "layer":
                model.model.layers[1].self_attn.k_proj.weight[0, 0].neg_()
            elif change == "embedding":
                model.model.embed_tokens.weight[3, 0].neg_()
            elif change == "shape":
                del model.model.layers[1]
                model.config.num_hidden_layers -= 1
        if change == "eos":
            tokenizer.eos_token = "<pad>"
        with pytest.raises(UserError, match=f"was written with another {what} than"):
            stage.read_written(folder / SELF_WRITTEN, model, tokenizer, tokens=100)

    def test_progress_rises_to_what_is_asked_for(self, model, tokenizer, tmp_path: Path) -> None:
        told: list[tuple[int, int]] = []
        write(model, tokenizer, tmp_path, progress=lambda *x: told.append(x))
        assert told == sorted(told)
        assert told[-1] == (300, 300)
        assert len(told) > 20

    def test_a_disk_that_is_full_or_a_place_that_is_none(
        self, model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot write"):
            write(model, tokenizer, tmp_path / "file")
        expected = write(model, tokenizer, tmp_path / "whole")

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(RunFailed, match=r"cannot write .*No space left.*--resume"):
                write(model, tokenizer, tmp_path)
        assert write(model, tokenizer, tmp_path) == expected

    @pytest.mark.parametrize(
        ("tokens", "length", "remedy"),
        [(0, 24, "pass at least 1"), (10, 2, "pass a greater length")],
    )
    def test_sizes_that_make_no_text(
        self, tokens: int, length: int, remedy: str, model, tokenizer, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=remedy):
            write(model, tokenizer, tmp_path, tokens=tokens, length=length)


def test_a_models_cache_bounds_the_batch(model, monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 layers of 2 KV heads of 8, keys and values, 4 bytes: 384 bytes per token
    fits: Callable[[int], int] = lambda length: decoding.fitting(model, length)  # noqa: E731
    assert fits(LENGTH) == 64
    monkeypatch.setattr(decoding, "_CACHE_BYTES", 384 * LENGTH * 10 + 1)
    assert [fits(LENGTH), fits(2 * LENGTH), fits(1000)] == [10, 5, 1]


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=20), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_where_its_number_falls(logits: list[float], number: float) -> None:
    found = int(draw(torch.tensor([logits]), torch.tensor([number], dtype=torch.float64))[0])
    chances = np.exp(np.array(logits, dtype=np.float32).astype(np.float64))
    below, above = chances[:found].sum() / chances.sum(), chances[: found + 1].sum() / chances.sum()
    assert below - 1e-12 <= number <= above + 1e-12


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_draw_by_parts_is_the_draw_of_all(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    numbers = torch.linspace(0.05, 0.95, 5, dtype=torch.float64)
    alone = [int(draw(x[None], n[None])) for x, n in zip(logits, numbers, strict=True)]
    assert len(set(alone)) > 2
    monkeypatch.setattr(decoding, "_DRAWN", rows * 30)
    assert draw(logits, numbers).tolist() == alone


@pytest.mark.slow
def test_processes_of_one_run_write_what_one_does(model, tokenizer, tmp_path: Path) -> None:
    """Started as a launcher does, killed at some point, and started again."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = (
        "import sys, json, torch\n"
        "from pathlib import Path\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from nuteprune.data import decoding\n"
        "from nuteprune.processes import everyone\n"
        "from nuteprune.stages.write import write\n"
        "torch.distributed.init_process_group('gloo')\n"
        "decoding.BATCH = 4\n"
        "folder = Path(sys.argv[1])\n"
        "model = AutoModelForCausalLM.from_pretrained(folder / 'model')\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder / 'model')\n"
        "def told(done, total):\n"
        "    print(done, flush=True)\n"
        "print(json.dumps(write(model, tokenizer, tokens=1500, length=24, seed=3,"
        " folder=folder / sys.argv[2], progress=told, team=everyone())))\n"
    )

    def start(folder: str, world: int) -> list[Forked]:
        found = []
        for rank, place in enumerate(ranks(world)):
            (said := tmp_path / f"said by {rank} of {world} in {folder}").mkdir()
            found.append(Forked(["-c", code, tmp_path, folder], said, **place))
        return found

    (alone,) = start("alone", 1)
    told = alone.wait().out.splitlines()
    (killed,) = start("shared", 1)
    while not any(int(x) > 500 for x in (killed.folder / "out").read_text().split("\n")[:-1]):
        assert killed.running()
        time.sleep(0.01)
    killed.send(signal.SIGKILL)
    assert killed.wait().code == -signal.SIGKILL
    written = [x.wait().out.splitlines() for x in start("shared", 2)]
    assert [x[-1] for x in written] == [told[-1]] * 2
    paths = [tmp_path / x / SELF_WRITTEN for x in ("alone", "shared")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
