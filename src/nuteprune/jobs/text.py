"""The text of a prune job: what is calibrated and trained on, and what is judged by."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nuteprune.console import megabytes
from nuteprune.data.blocks import BlockDataset, checked_shares, held_out_blocks, training_blocks
from nuteprune.data.self_written import room, seconds_to_write, write_text
from nuteprune.data.tokens import check_positions
from nuteprune.errors import UserError
from nuteprune.jobs.job import PruneJob
from nuteprune.judge.run_files import write_extra
from nuteprune.model.anatomy import Anatomy
from nuteprune.processes import is_main
from nuteprune.run_folder import SELF, SELF_WRITTEN, TEXT
from nuteprune.train.calibration import Progress
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.own_text import GUARD, tokens_to_write
from nuteprune.train.trainer import NutePruneTrainer


def mixture(job: PruneJob, sharded: bool = False) -> tuple[list[str], list[float]]:
    """Return what is calibrated and trained on: DATA specs and their shares.

    Where neither shares are given nor `self` is named, the model's own text guards what the data
    does not show.

    Args:
        job: the job.
        sharded: whether the model's weights are shared out over processes, where it cannot write.

    Raises:
        UserError: if shares are no numbers or do not fit the data, or a sharded model is to write.
    """
    specs, shares = job.specs, job.share_values
    if shares is not None or SELF in specs:
        if sharded and SELF in specs:
            raise UserError(f"a sharded model cannot write text: leave {SELF} out of --data")
        return specs, list(checked_shares(shares or None, specs))
    if sharded:
        return specs, [1.0] * len(specs)
    return [*specs, SELF], [(1 - GUARD) / len(specs)] * len(specs) + [GUARD]


def own_share(job: PruneJob, sharded: bool = False) -> float:
    """Return the share of the text that the model writes itself; see `mixture`."""
    specs, shares = mixture(job, sharded)
    return shares[specs.index(SELF)] / sum(shares) if SELF in specs else 0.0


class JobText:
    """Text of a job, for one model.

    Args:
        job: the job.
        config: the settings of its trainer.
        tokenizer: the model's tokenizer.
        model: the model's parts.

    Raises:
        UserError: if the text cannot be had, or does not suit the model.
    """

    def __init__(
        self,
        job: PruneJob,
        config: NutePruneConfig,
        tokenizer: PreTrainedTokenizerBase,
        model: Anatomy,
    ) -> None:
        check_positions(job.length, model.model.config)
        _check_room(config.blocks, job.length)
        self._job, self._config, self._tokenizer = job, config, tokenizer
        self._shared: dict[str, Any] = {
            "length": job.length,
            "text_column": job.text_column,
            "vocab_size": model.embedding.weight.shape[0],
        }
        self.specs, self.shares = mixture(job, config.sharded)
        if SELF in self.specs:
            room(tokenizer, job.length)  # fails before anything is removed or written
        # Until the model has written its own, something of the same size stands in for it.
        self.training = self._blocks([[0] * job.length])

    def _blocks(self, written: list[list[int]]) -> BlockDataset:
        config = self._config
        return training_blocks(
            self.specs,
            self._tokenizer,
            count=config.blocks,
            seed=config.seed,
            shares=self.shares,
            written=written,
            **self._shared,
        )

    def held_out(self) -> dict[str, Tensor]:
        """Return the blocks to judge by, source -> (N, T)."""
        spec = self._job.eval_data or self._job.specs
        return held_out_blocks(spec, self._tokenizer, count=self._job.eval_blocks, **self._shared)

    def _to_write(self, config: NutePruneConfig) -> int:
        """Return how many tokens the model writes itself, 0 if it has no share."""
        share = own_share(self._job, config.sharded)
        return tokens_to_write(config, share, self._job.length) if share else 0

    def seconds_to_write(self, trainer: NutePruneTrainer) -> float:
        """Return about how long `let_write` will take; see `data.self_written`."""
        if not (tokens := self._to_write(trainer.args)):
            return 0.0
        with trainer.model.disable_adapter():
            model, length = trainer.anatomy.model, self._job.length
            return seconds_to_write(model, self._tokenizer, tokens=tokens, length=length)

    def let_write(self, trainer: NutePruneTrainer, progress: Progress) -> bool:
        """Let the trainer's model write its share of the training text, if it has one.

        Before that, what the other text is known by is written down in the run's folder.

        What it has written is kept in the run's folder, and read from there on resume.

        Args:
            trainer: the run's.
            progress: told how far it has come.

        Returns:
            Whether text of other settings was there, and is replaced.
        """
        config, length = trainer.args, self._job.length
        folder = Path(cast(str, config.output_dir))
        if is_main():
            write_extra(folder, TEXT, self.training.fingerprint.to_dict())
        if not (tokens := self._to_write(config)):
            return False
        before = _first_line(folder)
        with trainer.model.disable_adapter():
            written = write_text(
                trainer.anatomy.model,
                self._tokenizer,
                tokens=tokens,
                length=length,
                seed=config.seed,
                folder=folder,
                progress=in_percent(progress),
            )
        self.training.blocks = self._blocks(written).blocks
        return before not in (b"", _first_line(folder))


def _first_line(run: Path) -> bytes:
    """Return the first line of what a run's model has written, b"" where it is not complete."""
    path = run / SELF_WRITTEN
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        line = file.readline()
    return line if line.endswith(b"\n") else b""


def in_percent(progress: Progress) -> Callable[[int, int], None]:
    """Return what is told of tokens written, and tells each percent once."""
    told = -1

    def tell(done: int, total: int) -> None:
        nonlocal told
        if (percent := 100 * done // total) > told:
            told = percent
            progress("writing text, percent", percent, 100)

    return tell


def _check_room(count: int, length: int) -> None:
    needed = 4 * count * length
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise UserError(
            f"{count} blocks of {length} tokens take {megabytes(needed)} of memory, and this "
            f"machine has {megabytes(memory)}; pass fewer steps, a smaller batch or length"
        )
