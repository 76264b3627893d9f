"""Prints and returns a plan's phases, for `plan` and for dry runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nuteprune.console import Output, duration, megabytes
from nuteprune.plan.phases import Phase, Plan

HELD = {8: 8, 4: 4.5}
"""Bits that a weight takes: NF4 has a scale in fp32 for each 64 of them."""
MEASURED_FOR = 0.3
"""Seconds that a rate is measured for."""


@dataclass(frozen=True)
class Rate:
    """Rates of the machine, per second.

    Args:
        plain: floating-point operations in the dtype of the run.
        fine: those in fp32 and finer, such as the inverses of scoring and refit.
        read: bytes that are read of memory; None: not known, and not counted.
    """

    plain: float
    fine: float
    read: float | None = None

    @classmethod
    def measured(cls, dtype: torch.dtype, device: str, plain: float | None = None) -> Rate:
        """Measure on a device the rates that are not given, for a run in `dtype`."""
        plain = plain or measured_rate(dtype, device)
        fine = plain if dtype == torch.float32 else measured_rate(torch.float32, device)
        return cls(plain, fine, measured_reading(device))

    def seconds(self, phase: Phase) -> float:
        """Return how long a phase takes."""
        need = phase.need
        reading = phase.read / self.read if self.read else 0
        return (need.flops - need.fine) / self.plain + need.fine / self.fine + reading


def measured_rate(dtype: torch.dtype, device: str) -> float:
    """Return the floating-point operations a second of a product of matrices on a device."""
    size = 1024 if device == "cpu" else 8192  # a launch takes longer than a small product
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _fastest(lambda: (a @ a)[0, 0])


def measured_reading(device: str) -> float:
    """Return the bytes a second that a sum of many numbers reads on a device."""
    a = torch.ones(2 ** (24 if device == "cpu" else 28), device=device)
    return a.nbytes / _fastest(a.sum)


def _fastest(act: Callable[[], Tensor]) -> float:
    """Return the seconds of the fastest of several calls."""
    found: list[float] = []
    started = time.monotonic()
    while not found or time.monotonic() - started < MEASURED_FOR:
        begun = time.monotonic()
        float(act())
        found.append(time.monotonic() - begun)
    return min(found)


def entry(phase: Phase, rate: Rate, peak: float) -> dict[str, Any]:
    """Return what JSON says of a phase, which holds `peak` bytes."""
    return {
        "phase": phase.name,
        "peak_bytes": round(peak),
        "flops": phase.need.flops,
        "seconds": rate.seconds(phase),
        "how": phase.how,
    }


def print_phases(entries: Sequence[Mapping[str, Any]], where: str, output: Output) -> None:
    """Print phases as a table; `where` says where their peaks are."""
    rows = [
        [
            x["phase"],
            megabytes(x["peak_bytes"]),
            f"{x['flops'] / 1e12:,.{0 if x['flops'] >= 1e13 else 2}f}",
            duration(x["seconds"]),
            x["how"],
        ]
        for x in entries
    ]
    output.table("What each phase takes", ["phase", where, "TFLOP", "time", "how"], rows)


def sharded(plan: Plan, peaks: Mapping[str, float], count: int) -> dict[str, float]:
    """Return peaks of phases on a device that shares sharded weights with others."""
    sizes = plan.sizes
    gathered = 2 * sizes.layer + sizes.outside
    saved = sizes.weights - sizes.weights / count - gathered
    return _without(plan, peaks, saved, plan.refitted / count)


def in_bits(plan: Plan, peaks: Mapping[str, float], bits: int) -> dict[str, float]:
    """Return peaks of phases on a device where projections are held in this many bits."""
    held = HELD[bits] / 8 / plan.dtype.itemsize
    return _without(plan, peaks, plan.sizes.projections * (1 - held))


def offloaded(plan: Plan, peaks: Mapping[str, float]) -> dict[str, float]:
    """Return peaks of phases on a device that has one layer at a time."""
    sizes = plan.sizes
    # Room of two: refitted weights are beside the teacher's.
    return _without(plan, peaks, sizes.weights - sizes.outside - 2 * sizes.layer)


def _without(
    plan: Plan, peaks: Mapping[str, float], saved: float, refitted: float = 0
) -> dict[str, float]:
    """Return peaks of phases without what is saved; of refitted weights, some bytes may stay."""
    stages = ("refit", "teach", *["score"][: plan.stops])
    own = dict.fromkeys(stages, plan.refitted - refitted)
    return {k: v - saved - own.get(k, 0) for k, v in peaks.items()}
