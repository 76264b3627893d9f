"""A run in less memory than its model and the process before it: a cgroup of Linux is the judge."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.hard

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_, little = map(load, ("plan", "little_memory"))


def test_a_model_is_pruned_in_less_memory_than_its_weights_and_libraries_take(
    tmp_path: Path,
) -> None:
    """Scored, re-fitted, trained, cut and written; byte for byte as without a limit."""
    size = little.SIZES["300m"]
    try:
        with little.limited(size.limit):
            pass
    except OSError as error:
        pytest.skip(f"no memory cgroup can judge here: {error}")
    found = little.compared(size, size.limit, tmp_path)
    assert found["limited_code"] == 0
    assert found["same"]
    assert found["weights"] > 0.6e9
