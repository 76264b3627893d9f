"""The text of a job: how much of it the model is asked to write."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from nuteprune.data.training_text import training_blocks
from nuteprune.stages.write import READINGS, tokens_to_write
from nuteprune.train.config import NutePruneConfig


@pytest.mark.parametrize(
    ("steps", "calibration_blocks", "readings"),
    [(1, 32, 1), (400, 32, 1), (1600, 32, READINGS), (80, 400, 1)],
)
def test_a_model_writes_what_is_read_and_no_more(
    steps: int, calibration_blocks: int, readings: int, tiny_tokenizer, tmp_path: Path
) -> None:
    config = NutePruneConfig(
        output_dir=str(tmp_path),
        max_steps=steps,
        calibration_blocks=calibration_blocks,
        use_cpu=True,
    )
    length, share = 9, 0.5
    tokens = tokens_to_write(config.blocks, config.calibrated_blocks, share, length)
    most = config.blocks
    # Each token is another one, so that how often it is read can be counted.
    blocks = training_blocks(
        "self",
        tiny_tokenizer,
        length=length,
        count=round(share * most),
        seed=0,
        written=[[i] for i in range(tokens)],
    ).blocks
    read = Counter(i for x in blocks.tolist() if x[:4] != x[5:] for i in x)
    assert set(read.values()) <= {readings - 1, readings}
    assert list(read.values()).count(readings) > 0.95 * tokens
