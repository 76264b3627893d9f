"""What a run writes to disk, from a config alone."""

from __future__ import annotations

from nuteprune.distill.teachers import snapshots
from nuteprune.train.phases import Run

ON_CPUS = ("refitted", "cut")
"""What `disk` counts that runs on CPUs alone write."""


def disk(run: Run) -> dict[str, float]:
    """Return the bytes that a run writes, by what they are for."""
    targets, sizes, each = run.targets, run.sizes, run.dtype.itemsize
    teachers = snapshots(targets[-1], run.schedule.ramp_steps) if run.snapshots else 0
    later = teachers * (1 - targets[0] / targets[-1])  # these have re-fitted weights, in bfloat16
    files = (run.written or run.dtype).itemsize / each
    refitted = sizes.refitted if run.args.compensation else 0
    checkpoint = 3 * sizes.adapters + refitted
    return {
        "result": sum(run.results) * files,
        "refitted": refitted,
        "tried": sizes.tried * run.priced,  # while units are scored
        "cut": run.results[0] * files,  # the same, until it is written
        "checkpoints": 3 * checkpoint if run.args.max_steps else 0,  # two are kept, one is written
        "teachers": teachers * sizes.adapters / 2 + later * refitted * 2 / each,
        "targets": (len(targets) - 1) * (sizes.adapters + refitted * 4 / each),
    }
