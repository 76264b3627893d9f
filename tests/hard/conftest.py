"""A server of quick runs, for tests that need hundreds of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: by a signal), what it printed, its events."""

    code: int
    said: str
    events: list[tuple[str, str]]

    @property
    def last_line(self) -> str:
        return self.said.strip().splitlines()[-1] if self.said.strip() else ""


class Server:
    """Runs commands in children of a process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(
        self,
        args: Sequence[Any],
        root: Path | None = None,
        fault: dict[str, Any] | None = None,
        demo: dict[str, Any] | None = None,
    ) -> Ended:
        """Run a command.

        Args:
            args: the command line.
            root: what is to be watched: files whose path begins so; None watches nothing.
            fault: what is to go wrong, see server.py.
            demo: another model in place of the demo's, see server.py.
        """
        log, events = self.folder / "log", self.folder / "events"
        request = {
            "args": [str(x) for x in args],
            "log": str(log),
            "events": str(events) if root else None,
            "root": str(root),
            "fault": fault,
            "demo": demo,
        }
        self.runs += 1
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = int(self._answer())
        lines = events.read_text().splitlines() if root else []
        seen = [(phase, name) for phase, _, name in (x.partition("\t") for x in lines)]
        return Ended(code, log.read_text(errors="replace"), seen)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of quick runs."""
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.process.communicate(timeout=10)
