"""A run in less memory than its model and the process before it: a cgroup of Linux is the judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import script

pytestmark = pytest.mark.hard


_, little = map(script, ("plan", "little_memory"))


def test_a_model_is_pruned_in_less_memory_than_its_weights_and_libraries_take(
    tmp_path: Path,
) -> None:
    """Scored, refitted, trained, cut and written; byte for byte as without a limit."""
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
