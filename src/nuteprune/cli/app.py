"""The `nuteprune` command: assembles the subcommands and turns errors into lines and exit codes.

Exit codes: 0 success, 1 a failed run or a missed target, 2 anything the user got wrong (one line
on stderr), 130 interrupted. NUTEPRUNE_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from importlib.metadata import version
from io import TextIOWrapper

import typer

from nuteprune.errors import Interrupted, RunFailed, UserError, panics_as_errors
from nuteprune.files import WRONG_PLACE, narrow_locale
from nuteprune.processes import BY_PEER, OTHER_ENDED, is_main, rank, several_started

LONGEST = 1000
"""Most characters of an error's line, which may quote long input of the user."""
COMMANDS = (
    *("demo", "plan", "prune", "eval", "bench", "recover"),
    *("export", "family", "inspect", "report", "vocab", "write"),
)
"""Commands in the order of help: each is a function of its name, but `eval`, which Python has."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nuteprune {version('nuteprune')}")
        raise typer.Exit


def _root(
    show_version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Make a language model physically smaller by structured pruning."""


def make_app() -> typer.Typer:
    """Return the command line with all its commands."""
    app = typer.Typer(
        name="nuteprune",
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    from nuteprune.cli import commands  # here: `main` checks names before anything else

    functions = {**vars(commands), "eval": commands.evaluate}
    for command in COMMANDS:
        app.command(command)(functions[command])
    return app


def main() -> None:
    """Run the command line and exit with its code."""
    debug = bool(os.environ.get("NUTEPRUNE_DEBUG"))
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what no terminal shows
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Read when torch is loaded. Threads that spin for long while they wait make a run on a shared
    # machine crawl. Where they never spin, two take 1.3 times as long on an idle one.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        if not debug:
            quiet_libraries()
        arguments = sys.argv[1:] or ["--help"]
        _check_names(arguments)
        with panics_as_errors():
            code = make_app()(arguments, standalone_mode=False, prog_name="nuteprune")
    except Interrupted as stop:
        _fail(str(stop) if is_main() else "", 128 + stop.signal)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if debug or (isinstance(error, UnicodeEncodeError) and not narrow_locale()):
            raise
        _fail(*_line_and_code(error))
    sys.exit(code if isinstance(code, int) else 0)


def _line_and_code(error: Exception) -> tuple[str, int]:
    """Return an error's line, empty where the main process alone prints it, and the exit code."""
    if isinstance(error, UserError):  # all processes of a run meet the same wrong input
        return str(error) if is_main() else "", 2
    if isinstance(error, RunFailed):
        return str(error) if is_main() else f"process {rank()}: {error}", 1
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename else ""
        return f"{what}{error.strerror or error}", 2 if error.errno in WRONG_PLACE else 1
    if isinstance(error, UnicodeEncodeError):  # a name that another file holds, or of the cache
        return f"{str(error.object)[:100]!r}: {narrow_locale()}", 2
    # Usage errors of the parsing library that typer carries with it know their message.
    if hasattr(error, "format_message"):
        return error.format_message(), 2
    if several_started() and BY_PEER in str(error):
        return f"process {rank()}: {OTHER_ENDED}", 1
    return f"{type(error).__name__}: {error} (NUTEPRUNE_DEBUG=1 shows where)", 1


def _check_names(arguments: list[str]) -> None:
    """Refuse names that Python could not decode: libraries, JSON and YAML take no such text.

    Raises:
        UserError: naming the first of them.
    """
    here = ""
    with suppress(OSError):  # a folder that is gone, which absolute paths do without
        here = os.getcwd()
    for name in (*arguments, here):
        if any("\udc80" <= letter <= "\udcff" for letter in name):
            shown = os.fsencode(name).decode("utf-8", "replace")
            raise UserError(f"{shown}: {narrow_locale() or 'the name is not UTF-8; rename it'}")


def _fail(message: str, code: int) -> None:
    if message:
        from nuteprune.console import printable  # rich takes its time

        line = printable(" ".join(message.split()))
        cut = f"{line[:LONGEST]} ..." if len(line) > LONGEST else line
        print(f"nuteprune: {cut}", file=sys.stderr)
    sys.exit(code)


def quiet_libraries() -> None:
    """Silence library output that users cannot act on."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")  # a level set here, its import resets
    if "transformers" in sys.modules:  # it has read these, in a program that calls `main`
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
