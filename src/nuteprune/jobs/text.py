"""The text of a prune job: what is calibrated and trained on, and its shares."""

from __future__ import annotations

import os

from transformers import PreTrainedTokenizerBase

from nuteprune.console import megabytes
from nuteprune.data.blocks import checked_shares
from nuteprune.data.mixture import GUARD, Mixture, tokens_to_write
from nuteprune.data.tokens import check_positions
from nuteprune.errors import UserError
from nuteprune.files import at_home
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.sources import load_model
from nuteprune.model.anatomy import Anatomy
from nuteprune.run_folder import SELF
from nuteprune.stages.write import read_written, room
from nuteprune.train.config import NutePruneConfig


def mixture(job: PruneJob) -> tuple[list[str], list[float]]:
    """Return the calibration and training text: DATA specs and their shares.

    Where neither shares are given nor `self` is named, the model's own text guards what the data
    does not show.

    Args:
        job: the job.

    Raises:
        UserError: if shares are no numbers or do not fit the data, or self-written text has no
            share.
    """
    specs, shares = job.specs, job.share_values
    if shares is not None or SELF in specs:
        if job.own_text is not None and SELF not in specs:
            raise UserError(
                f"--shares leaves no share for --own-text {job.own_text}: leave one of the two "
                f"out, or add --data {SELF} and its share"
            )
        return specs, list(checked_shares(shares or None, specs))
    return [*specs, SELF], [(1 - GUARD) / len(specs)] * len(specs) + [GUARD]


def own_share(job: PruneJob) -> float:
    """Return the share of the text that the model writes itself; see `mixture`."""
    specs, shares = mixture(job)
    return shares[specs.index(SELF)] / sum(shares) if SELF in specs else 0.0


def share_to_write(job: PruneJob) -> float:
    """Return the share of the text that the model has yet to write; see `mixture`."""
    return own_share(job) if job.own_text is None else 0.0


def text_of(
    job: PruneJob, config: NutePruneConfig, tokenizer: PreTrainedTokenizerBase, model: Anatomy
) -> Mixture:
    """Return the text of a job, for one model.

    Raises:
        UserError: if the text cannot be had, or does not suit the model.
    """
    check_positions(job.length, model.model.config)
    needed = 4 * config.blocks * job.length
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise UserError(
            f"{config.blocks} blocks of {job.length} tokens take {megabytes(needed)} of memory, "
            f"and this machine has {megabytes(memory)}; pass fewer steps, a smaller batch or length"
        )
    specs, shares = mixture(job)
    if SELF in specs:
        room(tokenizer, job.length)  # fails before anything is removed or written
    share = own_share(job)
    read = (config.blocks, config.calibrated_blocks)
    own = tokens_to_write(*read, share, job.length) if share else 0
    written = None
    if job.own_text is not None:
        # Weights in few bits are others than those that wrote.
        writer = load_model(job.dense, None) if job.bits else model.model
        written = read_written(at_home(job.own_text), writer, tokenizer, tokens=own)
    text = Mixture(
        specs,
        shares,
        tokenizer,
        job.length,
        count=config.blocks,
        to_write=own if written is None else 0,
        seed=config.seed,
        column=job.text_column,
        vocabulary=model.embedding.weight.shape[0],
        written=written,
    )
    if job.own_text is not None:
        text.training.fingerprint.add_file(at_home(job.own_text))
    return text
