"""What a run loads of the package: what it does not use, it does not import."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.forked import python

MOST = 100
"""Modules that a default run loads. At most 100: lower it whenever there are fewer."""
SCRIPT = """
import json, sys
import nuteprune
model, text, out = sys.argv[1:]
small = {"steps": 1, "length": 24, "batch_size": 2, "eval_blocks": 2, "calibration_blocks": 2}
here = {"device": "cpu", "dtype": "float32", "quiet": True}
nuteprune.prune(model, out=out, sparsity=0.3, data=text, **small, **here)
print(json.dumps([x for x in sys.modules if x.split(".")[0] == "nuteprune"]))
"""
RARE = ("evaluate", "exactness", "family", "plan", "recover", "speed", "timing", "vocab")
"""Modules of jobs that only other commands, or rare options, need."""


@pytest.mark.slow(20)
def test_a_default_run_loads_what_it_uses(tiny_inputs: tuple[Path, Path], tmp_path: Path) -> None:
    done = python("-c", SCRIPT, *tiny_inputs, tmp_path / "out")
    assert done.code == 0, done.err
    loaded = json.loads(done.out.splitlines()[-1])
    assert not {f"nuteprune.jobs.{name}" for name in RARE} & set(loaded)
    assert len(loaded) <= MOST, sorted(loaded)
