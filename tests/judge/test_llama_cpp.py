"""llama.cpp as an engine, with a stand-in for its binding; tests/clients has the real one."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter

from nuteprune.errors import RunFailed
from nuteprune.judge.llama_cpp import LlamaCppRunner
from nuteprune.judge.work import Work, Workload
from tests.stand_in_llama_cpp import Library, install

TOKENS = 40
WORK = Work(100, 100, 0, 100, 2, 32, 0, 0, 3, 3)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return install(monkeypatch, TOKENS)


@pytest.fixture
def runner(library: Library, tmp_path: Path) -> LlamaCppRunner:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return LlamaCppRunner(str(tmp_path / "model.gguf"), WORK, 64, threads=1)


def test_a_pass_is_a_prompt_and_the_likeliest_tokens_after_it(
    runner: LlamaCppRunner, library: Library
) -> None:
    timing = runner.time(Workload(batch_size=2, length=5, new_tokens=3))
    assert timing.first_token > 0
    assert timing.decode > 0
    ((prompt, *decoded),) = library.passes
    assert [(at, row) for _, at, row in prompt] == [(t, row) for row in (0, 1) for t in range(5)]
    lasts = prompt[4][0], prompt[9][0]
    assert decoded == [
        [((last + step) % TOKENS, 4 + step, row) for row, last in enumerate(lasts)]
        for step in (1, 2, 3)
    ]
    assert len({token for token, _, _ in prompt}) > 5


def test_a_context_is_made_for_each_setting(runner: LlamaCppRunner, library: Library) -> None:
    short, long = Workload(1, 5, 3), Workload(3, 255, 2)
    for setting in (short, short, long):
        runner.time(setting)
    assert len(library.passes) == 3
    assert [(x.n_ctx, x.n_seq_max, x.freed) for x in library.contexts] == [
        (256, 1, True),
        (3 * 512, 3, False),
    ]
    assert {x.n_threads for x in library.contexts} == {1}
    assert {(x.type_k, x.type_v) for x in library.contexts} == {(1, 1)}  # float16, as the weights


def test_it_tells_what_it_is(runner: LlamaCppRunner) -> None:
    about = runner.about
    assert (about.engine, about.work, about.positions) == ("llama.cpp b0", WORK, 64)
    assert (about.threads, about.hardware) == (1, "CPU")


def test_what_llama_cpp_says_is_handed_on(runner: LlamaCppRunner, library: Library) -> None:
    with pytest.raises(RunFailed, match=r"cannot run it: no such file$"):
        LlamaCppRunner("nowhere.gguf", WORK, None)
    library.code = -3
    with pytest.raises(RunFailed, match="code -3"):
        runner.time(Workload(1, 5, 3))
