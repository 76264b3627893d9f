"""A run in less memory than its model and the process before it: a cgroup of Linux is the judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import script

pytestmark = pytest.mark.hard


_, little = map(script, ("plan", "little_memory"))


def skip_without_cgroups(limit: float) -> None:
    """Skip where no memory cgroup can be made, or where it kills nobody."""
    try:
        with little.limited(limit):
            pass
    except OSError as error:
        pytest.skip(f"no memory cgroup can judge here: {error}")


def test_a_model_is_pruned_in_less_memory_than_its_weights_and_libraries_take(
    tmp_path: Path,
) -> None:
    """Scored, refitted, trained, cut and written; byte for byte as without a limit."""
    size = little.SIZES["300m"]
    skip_without_cgroups(size.limit)
    found = little.compared(size, size.limit, tmp_path)
    assert found["limited_code"] == 0
    assert found["same"]
    assert found["weights"] > 0.6e9


def test_no_process_of_a_sharded_run_holds_the_model(tmp_path: Path) -> None:
    """Each of four takes less than three quarters of its bytes, what libraries take among them."""
    limit = 2.6e9
    skip_without_cgroups(limit)
    found = little.compared(little.SIZES["2b"], limit, tmp_path, processes=4, only_limited=True)
    assert found["limited_code"] == 0
    assert found["weights"] > 1.4 * limit
