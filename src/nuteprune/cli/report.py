"""`nuteprune report`: one page that shows a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuteprune.cli import options as o
from nuteprune.jobs.guard import check_writable


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The --out folder of prune or recover, finished or not."
        ),
    ],
    as_json: o.Json = False,
) -> None:
    """Write RUN's report: one HTML page, and its plots as PNG.

    The page needs no network.
    """
    check_writable("RUN", folder)
    from nuteprune.console import Output
    from nuteprune.jobs.reproduce import again
    from nuteprune.judge.report import PLOTS, write_report

    output = Output(as_json)
    page = write_report(folder, again)
    plots = sorted((page.parent / PLOTS).glob("*.png"))
    output.line(f"Report  {page}")
    output.line(f"Plots   {page.parent / PLOTS} ({', '.join(path.stem for path in plots)})")
    output.result({"report": str(page), "plots": [str(path) for path in plots]})
