"""Plans whose phases nobody goes through: that is a second of work for each, and more.

tests/jobs/test_plan.py and tests/jobs/test_dry_run.py go through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nuteprune.train.extrapolate import Need
from nuteprune.train.phases import Run


def leave_unplanned(replace: Callable[[Any, str, Any], None]) -> None:
    """Let each phase take the same.

    Args:
        replace: does it, such as `setattr` of `pytest.MonkeyPatch`.
    """
    for name in ("simulated", "_one_by_one", "_step"):
        replace(Run, name, lambda *_, **__: Need(peak=1e9, flops=1e9))
