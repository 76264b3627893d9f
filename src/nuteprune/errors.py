"""The exceptions that the command line shows as one line, and any exception's one-line text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """Something the user can fix: printed as one clear line, exit code 2."""


class RunFailed(Exception):
    """A run that started and failed later: printed as one line, exit code 1."""


class Interrupted(Exception):
    """A run that was asked to stop, and has saved its state.

    Args:
        message: what was saved, and how to go on.
        signal: number of the signal that asked.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def some(names: Sequence[object], most: int = 3) -> str:
    """Return the first few of several names as text, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is most like one, empty where none is."""
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def in_one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise panics of libraries in Rust as RuntimeError: they are no `Exception` by themselves."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a class that no module shows
            raise
        raise RuntimeError(in_one_line(error)) from error
