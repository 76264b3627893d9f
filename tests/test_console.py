"""Progress of long work, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nuteprune.console import Bars, Output, megabytes, millions


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("nuteprune.console.time", clock)
    return clock


def log() -> tuple[Bars, io.StringIO]:
    file = io.StringIO()
    return Bars(Console(file=file, force_terminal=False, width=200)), file


@pytest.mark.parametrize("first", [0, 1, 40])  # a run that goes on does not begin at 0
def test_a_log_says_how_long_the_rest_takes(first: int, clock: Clock) -> None:
    bars, file = log()
    for done in range(first, 81):
        bars.update("pruning", done, 80, "loss 0.5")
        clock.now += 45
    lines = file.getvalue().splitlines()
    assert len(lines) <= 12
    assert "pruning: 48/80  about 24 min left  loss 0.5" in lines  # 32 steps of 45 s
    assert "pruning: 72/80  about 6 min left  loss 0.5" in lines
    assert lines[-1] == "pruning: 80/80  loss 0.5"


def test_long_work_is_heard_of_after_a_minute(clock: Clock) -> None:
    bars, file = log()
    for done in range(6):
        bars.update("pruning", done, 10_000)
        clock.now += 31
    assert file.getvalue().splitlines() == ["pruning: 2/10000  about 86.1 h left"]


def test_work_that_comes_up_again_has_a_pace_of_its_own(clock: Clock) -> None:
    bars, file = log()
    for pace in (100, 1):
        for done in range(4):
            bars.update("fitting", done, 3)
            clock.now += pace
    lines = file.getvalue().splitlines()
    assert lines[:3] == [
        "fitting: 1/3  about 3 min left",
        "fitting: 2/3  about 2 min left",
        "fitting: 3/3",
    ]
    assert lines[3:] == [
        "fitting: 1/3  about 2 s left",
        "fitting: 2/3  about 1 s left",
        "fitting: 3/3",
    ]


def test_a_terminal_shows_it_in_the_bar(clock: Clock) -> None:
    file = io.StringIO()
    bars = Bars(Console(file=file, force_terminal=True, width=200))
    with bars.progress:
        for done in range(3):
            bars.update("pruning", done, 10)
            clock.now += 20
        bars.progress.refresh()
    assert "about 3 min left" in file.getvalue()  # 8 of 20 s


@pytest.mark.parametrize("width", [40, 60, 120])
def test_a_table_loses_no_figures_on_a_narrow_terminal(width: int) -> None:
    output, file = Output(), io.StringIO()
    output.console = Console(file=file, width=width)
    settings = "--batch-size 1 --set gradient_accumulation_steps=4 --gradient-checkpointing"
    output.table("Settings", ["settings", "peak", "time"], [[settings, "99.0 MB", "1.00"]])
    assert max(map(len, file.getvalue().splitlines())) <= width
    assert {"99.0", "MB", "1.00"} <= set(file.getvalue().split())
    assert "…" not in file.getvalue()
    if width == 120:
        assert settings in file.getvalue()


def test_names_keep_their_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    output, name = Output(), "a[old].txt [/b] c4:id:train"  # `:id:` is an emoji's code, too
    output.table(name, ["", name], [[name, "1"]])
    with output.bars() as bars:
        bars.update(name, 1, 1, name)
    stdout, stderr = capsys.readouterr()
    assert (stdout.count(name), stderr.count(name)) == (3, 2)


def test_a_bar_on_a_terminal_keeps_brackets() -> None:
    text = io.StringIO()
    bars = Bars(Console(file=text, force_terminal=True, width=120))
    with bars.progress:
        bars.update("a[old]", 1, 1, "[/b]")
    assert "a[old]" in text.getvalue()
    assert "[/b]" in text.getvalue()


@pytest.mark.parametrize(
    ("value", "count", "size"),
    [
        (999, "999", "999 B"),
        (56_224, "56.2k", "56.2 kB"),
        (186_612, "186.6k", "186.6 kB"),
        (1_234_567, "1.23M", "1.23 MB"),
        (134_515_008, "134.5M", "134.5 MB"),
        (1_234_567_890, "1.23B", "1.23 GB"),
    ],
)
def test_sizes_have_three_digits_whatever_their_scale(value: int, count: str, size: str) -> None:
    assert (millions(value), megabytes(value)) == (count, size)
