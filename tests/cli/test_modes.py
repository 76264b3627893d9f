"""All files are as readable as any other that the user writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Run

from .conftest import TINY

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows knows no umask")


@pytest.fixture(params=[0o027, 0o002], ids=oct)
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask meanwhile: for the group to read, or to write."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.slow
def test_files_follow_the_umask(
    run: Run, model: Path, text: Path, mask: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["prune", model, "--sparsity", "0.3", "--data", text, "--out", out, *TINY["prune"]]
    code, _, err = run(*command, "--set", "save_steps=2")
    assert code == 0, err
    code, _, err = run("export", out, "--to", "gguf", "--out", out / "run" / "model.gguf")
    assert code == 0, err
    modes = {str(x.relative_to(out)): x.stat().st_mode & 0o777 for x in out.rglob("*")}
    wanted = {n: (0o777 if (out / n).is_dir() else 0o666) & ~mask for n in modes}
    assert modes == wanted
    assert {"model.safetensors", "modeling_pruned.py", "run/checkpoint-4/optimizer.pt"} <= set(
        modes
    )
