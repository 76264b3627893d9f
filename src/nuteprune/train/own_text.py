"""How much text a model writes itself: all that a short run reads of it, less for a long one."""

from __future__ import annotations

from nuteprune.data.blocks import written_blocks
from nuteprune.train.config import NutePruneConfig

GUARD = 0.5
"""Share of the text that the model writes itself, where nothing else is said. Calibrated on one
kind of text alone, a model keeps that and forgets the rest; see docs/quality.md."""
ONCE = 1600
"""Blocks of training up to which the model writes all of its share: 400 steps of 4."""
READINGS = 4
"""Most times that longer training reads what the model has written."""


def tokens_to_write(config: NutePruneConfig, share: float, length: int) -> int:
    """Return how many tokens a model writes itself.

    Args:
        config: the run's settings.
        share: its share of the run's blocks.
        length: tokens per block.
    """
    once = max(config.calibrated_blocks, min(config.blocks, ONCE))
    blocks = max(once, config.blocks / READINGS)
    return written_blocks(max(1, round(share * blocks))) * length
