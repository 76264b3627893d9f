"""A server of quick runs, for tests that need hundreds of them."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SEED = int(os.environ.get("NUTEPRUNE_SEED", "0"))
"""Draws all that goes wrong."""
SHARE = float(os.environ.get("NUTEPRUNE_HARD", "1"))
"""Of all cases, for a quick look."""
CASE = os.environ.get("NUTEPRUNE_CASE")
"""The one case to repeat, by its number."""


def cases(count: int) -> range:
    """Return the numbers of the cases to try."""
    if CASE is not None:
        return range(int(CASE), int(CASE) + 1)
    return range(math.ceil(SHARE * count))


def make_model(here: Path, tiny_model: Any, tiny_tokenizer: Any) -> list[str]:
    """Write a model and text into a folder, as `model` and `text.jsonl`; returns the texts."""
    tiny_model("llama", vocab_size=320, num_hidden_layers=2).save_pretrained(here / "model")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for x in messages %}{{ x.role[0] }}:{{ x.content }};{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer.save_pretrained(here / "model")
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=6000))
    texts = [letters[i : i + 60] for i in range(0, 6000, 60)]
    lines = "".join(json.dumps({"text": x}) + "\n" for x in texts)
    (here / "text.jsonl").write_text(lines)
    return texts


def make_demo(model: Path, out: Path, tiny_model: Any) -> None:
    """Write a model with the tokens of the demo's into a folder."""
    tiny_model("llama", vocab_size=320, max_position_embeddings=512).save_pretrained(out)
    names = {"<pad>": "<|endoftext|>", "<s>": "<|im_start|>", "</s>": "<|im_end|>"}
    for path in model.glob("tokenizer*.json"):
        text = path.read_text()
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        (out / path.name).write_text(text)


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: by a signal), what it printed, events, CPU seconds."""

    code: int
    said: str
    events: list[tuple[str, str]]
    seconds: float

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
            [sys.executable, "-m", "tests.hard.server"],
            cwd=Path(__file__).parents[2],
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
        folder: Path | None = None,
        processes: int | None = None,
    ) -> Ended:
        """Run a command.

        Args:
            args: the command line.
            root: what is to be watched: files whose path begins so; None watches nothing.
            fault: what is to go wrong; this and the rest see server.py.
            demo: another model in place of the demo's.
            folder: where the command runs.
            processes: how many do it together.
        """
        log, events = self.folder / "log", self.folder / "events"
        request = {
            "args": [str(x) for x in args],
            "log": str(log),
            "events": str(events) if root else None,
            "root": str(root),
            "fault": fault,
            "demo": demo,
            "folder": str(folder) if folder else None,
            "processes": processes,
        }
        self.runs += 1
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code, seconds = self._answer().split()
        lines = events.read_text().splitlines() if root else []
        seen = [(phase, name) for phase, _, name in (x.partition("\t") for x in lines)]
        return Ended(int(code), log.read_text(errors="replace"), seen, float(seconds))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of quick runs."""
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.process.communicate(timeout=10)
