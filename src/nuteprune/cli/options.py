"""Options: those that several commands share, and those that settings declare for themselves."""

from __future__ import annotations

import functools
import inspect
import keyword
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from nuteprune.jobs.job import Job
from nuteprune.jobs.options import REPLACE
from nuteprune.train.declared import declared

Work = Callable[[Any], Mapping[str, Any] | None]
"""What a command does when its options are known to be right: given a `console.Output`, it returns
what `--json` prints."""
_JOB = declared(Job)


def _option(name: str, **more: Any) -> Any:
    return typer.Option(_JOB[name].option, help=_JOB[name].help, **more)


Model = Annotated[str, typer.Argument(help=_JOB["model"].help)]
# As text, since "" would be the path of the folder that the user is in.
Out = Annotated[str, _option("out", metavar="PATH")]
OptionalOut = Annotated[str | None, _option("out", metavar="PATH")]
Config = Annotated[Path | None, typer.Option(help="YAML file with settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, key=value (docs/settings.md lists them); repeatable."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help=REPLACE)]
Json = Annotated[bool, typer.Option("--json", help="End with one machine-readable line.")]


def command(
    *kinds: type, but: Collection[str] = ()
) -> Callable[[Callable[..., Work]], Callable[..., None]]:
    """Make a command of a function, with the options that settings declare, and `--json`.

    Args:
        *kinds: the dataclasses that declare them.
        but: settings, by word, that the command does not offer.

    Returns:
        A decorator for a function that takes `**given`: word -> value of each that is given.
    """

    def decorate(function: Callable[..., Work]) -> Callable[..., None]:
        @functools.wraps(function)
        def made(as_json: bool, **options: Any) -> None:
            work = function(**{name: x for name, x in options.items() if x is not None})
            from nuteprune.console import Output  # rich takes its time

            output = Output(as_json)
            output.result(work(output))

        hints = get_type_hints(function, include_extras=True)
        own = [
            x.replace(annotation=hints[x.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for x in inspect.signature(function).parameters.values()
            if x.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        without = {x.name for x in own} | set(but)
        more = [x for kind in kinds for x in _parameters(kind) if x.name not in without]
        at = sum(x.default is inspect.Parameter.empty for x in own)
        own[at:at] = more
        own.append(_parameter("as_json", Json, False))
        made.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        return made

    return decorate


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, only, default=default, annotation=hint)


def _parameters(kind: type) -> list[inspect.Parameter]:
    """Return a parameter for each option that a dataclass declares."""
    hints, found = get_type_hints(kind), []
    for name, x in declared(kind).items():
        if x.option is not None:
            plain: Any = bool if x.flag else _plain(hints[name])
            plain = list[str] if x.several else plain
            hint = Annotated[plain | None, typer.Option(x.option, help=x.help)]
            called = name if keyword.iskeyword(x.word) else x.word  # as `for`
            found.append(_parameter(called, hint, None))
    return found


def _plain(hint: Any) -> Any:
    """Return the type to read an option as; text where it may have several values."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, str, Path) else str
