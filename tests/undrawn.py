"""The command line with blank pictures: drawing is half of the time that a tiny run takes.

tests/judge/test_report.py and tests/cli/test_report.py draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any

from matplotlib.figure import Figure


def leave_blank(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let figures be saved as pictures of nothing.

    Args:
        replace: does it, such as `setattr` of `pytest.MonkeyPatch`.
    """

    def savefig(self: Figure, file: IO[Any], *, format: str, **_: Any) -> None:
        file.write('<svg viewBox="0 0 1 1"></svg>' if format == "svg" else b"\x89PNG\r\n\x1a\n")

    replace(Figure, "savefig", savefig)


if __name__ == "__main__":
    from nuteprune.cli.app import main

    leave_blank()
    main()
