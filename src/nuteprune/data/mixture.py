"""The text of a run: sources and shares, what the model writes itself, and what calibrates.

Shape suffixes: N blocks, T tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from nuteprune.data.blocks import (
    BlockDataset,
    HeldOut,
    held_out_blocks,
    training_blocks,
    written_blocks,
)
from nuteprune.run_folder import SELF

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


@dataclass
class Mixture:
    """Text for one model.

    Args:
        specs: DATA specs; `self` is what the model writes.
        shares: of the tokens, one for each spec.
        tokenizer: the model's.
        length: tokens per block.
        count: blocks to train on.
        to_write: tokens that the model writes itself, 0 where it has no share.
        seed: draws the order of passages and blocks.
        column: the one that holds the text in structured files; None finds it.
        vocabulary: the model's number of token ids.
        written: what the model has written before the run; None: nothing.

    Raises:
        UserError: if the text cannot be had, or does not suit the model.
    """

    specs: Sequence[str]
    shares: Sequence[float]
    tokenizer: PreTrainedTokenizerBase
    length: int
    count: int
    to_write: int
    seed: int
    column: str | None
    vocabulary: int
    written: Sequence[list[int]] | None = None
    training: BlockDataset = field(init=False)

    def __post_init__(self) -> None:
        # Until the model has written its own, something of the same size stands in for it.
        self.training = self._blocks(self.written or [[0] * self.length])

    def use_written(self, written: Sequence[list[int]]) -> None:
        """Train on what the model has written, where it has a share.

        Args:
            written: token ids of each text, as `stages.write` returns them.
        """
        self.training.blocks = self._blocks(written).blocks

    def _blocks(self, written: Sequence[list[int]]) -> BlockDataset:
        return training_blocks(
            self.specs,
            self.tokenizer,
            length=self.length,
            count=self.count,
            seed=self.seed,
            shares=self.shares,
            written=written if SELF in self.specs else (),
            text_column=self.column,
            vocab_size=self.vocabulary,
        )

    def held_out(self, specs: str | Sequence[str], count: int) -> HeldOut:
        """Return blocks to judge by, source -> (N, T), N at most `count`."""
        return held_out_blocks(
            specs,
            self.tokenizer,
            length=self.length,
            count=count,
            text_column=self.column,
            vocab_size=self.vocabulary,
        )
