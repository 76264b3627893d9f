"""Plans whose stages nobody goes through: that is a second of work for each, and more.

And the machine's rates are measured once, not for a while.

tests/jobs/test_plan.py and tests/jobs/test_planned.py go through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nuteprune.jobs import planned
from nuteprune.plan.need import Need
from nuteprune.plan.phases import Plan


def leave_unplanned(replace: Callable[[Any, str, Any], None]) -> None:
    """Let each stage take the same.

    Args:
        replace: does it, such as `setattr` of `pytest.MonkeyPatch`.
    """
    replace(Plan, "walked", lambda *_, **__: Need(peaks=(1e9, 1e9), flops=1e9))
    replace(planned, "MEASURED_FOR", 0.0)
