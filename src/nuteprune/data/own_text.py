"""How much text a model writes itself: as much as a short run reads, less for a long one."""

from __future__ import annotations

from nuteprune.data.blocks import written_blocks

GUARD = 0.5
"""Share of the text that the model writes itself, by default. Calibrated on one kind of text alone,
a model keeps that and forgets the rest; see docs/quality.md."""
ONCE = 1600
"""Blocks of training up to which the model writes all of its share: 400 steps of 4."""
READINGS = 4
"""How often longer training reads self-written text at most."""


def tokens_to_write(blocks: int, calibrated: int, share: float, length: int) -> int:
    """Return how many tokens a model writes itself.

    Args:
        blocks: how many the run reads.
        calibrated: how many of these it reads before the first step.
        share: the model's share of the run's blocks.
        length: tokens per block.
    """
    once = max(calibrated, min(blocks, ONCE))
    return written_blocks(max(1, round(share * max(once, blocks / READINGS)))) * length
