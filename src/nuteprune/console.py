"""What commands print: tables, lines, progress bars, the JSON line."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Drawn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from nuteprune.files import to_json
from nuteprune.processes import is_main

_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that steer a terminal or turn the order of letters; lines and tabs are left."""
Progress = Callable[[str, int, int], None]
"""Called with (name of the work, units done, units in all) during long work."""
WIDE = 200
"""Columns where there is no terminal to fit: a file or a pipe takes tables whole."""


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide transformers' progress bars, and warnings between libraries, inside the context."""
    from transformers.utils import logging as transformers_logging  # tables need none of it

    drawn = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft asks transformers by the attribute's old name.
            old_name = "`is_gradient_checkpointing` is deprecated"
            warnings.filterwarnings("ignore", old_name, FutureWarning)
            yield
    finally:
        if drawn:
            transformers_logging.enable_progress_bar()


def printable(text: str) -> str:
    """Return text without the control characters that a terminal would obey."""
    return _UNSHOWN.sub("", text)


class _Terminal(Console):
    """A console that prints control characters as letters, so that files cannot steer it."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the printed parts without control characters, except rich's own."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)


class Output:
    """Prints for a person, and with `as_json` one machine-readable line as the last on stdout.

    Where several processes share a run, the main one alone prints.

    Args:
        as_json: print results as JSON; lines for people then go to stderr.
        quiet: print nothing at all.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        quiet = quiet or not is_main()
        # Names of files and models may have brackets or colons: `id[:config[:split]]`.
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
        self.console = _Terminal(stderr=as_json, soft_wrap=False, quiet=quiet, **plain)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = WIDE
        self.progress_console = _Terminal(stderr=True, quiet=quiet, **plain)

    def line(self, text: str = "") -> None:
        """Print a line for people."""
        self.console.print(text, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table for people; the first column is text, the others numbers."""
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, column in enumerate(columns):
            # On a narrow terminal cells take several lines: cut off, they would lose figures.
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        # Apart from the table, which would break it into lines of its own width.
        self.console.print(Text(title, style="bold"), soft_wrap=True)
        self.console.print(table)

    def result(self, data: Mapping[str, Any] | None) -> None:
        """Print the JSON line, if it was asked for; of the main process's result alone."""
        if self.as_json and is_main() and data is not None:
            print(to_json(data), flush=True)

    @contextmanager
    def bars(self) -> Iterator[Bars]:
        """Show progress on stderr for a while: live on a terminal, a few lines elsewhere."""
        bars = Bars(self.progress_console)
        with bars.progress:
            yield bars


class Bars:
    """Progress bars, one for each kind of work, shown when that work begins.

    Each estimates the time left by the pace since it appeared.

    Args:
        console: where they are drawn; if it is no terminal, a line is printed now and then: at each
            tenth, and after the first minute.
    """

    LINES = 10
    MINUTE = 60

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Drawn(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._paces: dict[str, _Pace] = {}

    def update(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` units of some work are done."""
        now = time.monotonic()
        pace = self._paces.get(what)
        if pace is None or done <= pace.done:  # the same work may come up again
            pace = self._paces[what] = _Pace(done, now)
        since = done - pace.done
        rest = (now - pace.started) * (total - done) / since if since else 0.0
        left = f"about {duration(rest)} left" if rest else ""
        if not self.console.is_terminal:
            every = max(1, total // self.LINES)
            minute = bool(rest) and not pace.told and now - pace.started >= self.MINUTE
            if done == total or (done and done % every == 0) or minute:
                pace.told = True
                parts = (f"{what}: {done}/{total}", left, note)
                self.console.print("  ".join(part for part in parts if part), soft_wrap=True)
            return
        if what not in self._tasks:
            self._tasks[what] = self.progress.add_task(what, total=total, note=note, left=left)
        self.progress.update(self._tasks[what], completed=done, total=total, note=note, left=left)


@dataclass
class _Pace:
    """When a bar appeared, and how much of its work was done by then."""

    done: int
    started: float
    told: bool = False
    """Whether a line of it was printed."""


def scaled(value: float, billions: str) -> tuple[str, str]:
    """Return a number in at least three digits, and the letter of its scale.

    Args:
        value: a count, or bytes.
        billions: the letter of 10^9: `B` of a count, `G` of bytes.
    """
    for scale, letter in ((1e9, billions), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            digits = 2 if letter == billions or value < 10 * scale else 1
            return f"{value / scale:.{digits}f}", letter
    return f"{value:.0f}", ""


def millions(count: float) -> str:
    """Return a parameter count for people, such as 134.5M."""
    return "".join(scaled(count, "B"))


def megabytes(size: float) -> str:
    """Return a size for people, such as 134.5 MB."""
    return "{} {}B".format(*scaled(size, "G"))


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def dtype_name(dtype: object) -> str:
    """Return a torch dtype as options name it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def silent(what: str, done: int, total: int) -> None:
    """Report no progress."""


def counted(progress: Progress, what: str, total: int) -> Callable[[], None]:
    """Return a function that reports one more unit to `progress` each time it is called."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    progress(what, 0, total)
    return tick
