"""The text of a recover job: of what kind it is, what is learned, and whether a model takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data.blocks import training_blocks
from nuteprune.data.examples import holds_instructions, read_examples
from nuteprune.data.tokens import check_ids, check_positions
from nuteprune.jobs.job import INSTRUCTIONS, TEXT, RecoverJob
from nuteprune.model.anatomy import Anatomy
from nuteprune.train.config import RecoverConfig


def kind_of_text(job: RecoverJob) -> str:
    """Return the kind of a job's text: instructions or plain text.

    Raises:
        UserError: if it cannot be read.
    """
    return INSTRUCTIONS if holds_instructions(job.text, job.text_column) else TEXT


def training_text(
    job: RecoverJob,
    kind: str,
    config: RecoverConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> Dataset[Any]:
    """Return the training text of a model, as long as its steps need.

    Args:
        job: the job.
        kind: of its text.
        config: the trainer's settings; plain text needs a number of steps.
        tokenizer: the model's.
        model: the model that learns.

    Raises:
        UserError: if the text cannot be had, or the tokenizer is of another model.
    """
    each = config.sequences_per_step
    count = config.max_steps * each if config.max_steps > 0 else None
    given: dict[str, Any] = {
        "length": job.length,
        "text_column": job.text_column,
        "vocab_size": _vocabulary(model),
    }
    if kind == INSTRUCTIONS:
        return read_examples(
            job.text, tokenizer, most=count, template=job.template, seed=config.seed, **given
        )
    assert count is not None
    return training_blocks(job.text, tokenizer, count=count, seed=config.seed, **given)


def check_room(
    training: Dataset[Any], judged: Mapping[str, Tensor], model: PreTrainedModel
) -> None:
    """Refuse text that a model has no positions or no token ids for.

    Args:
        training: what it learns.
        judged: what it is judged by, source -> token ids (N, T).
        model: the model.

    Raises:
        UserError: saying which.
    """
    longest = max(len(item["input_ids"]) for item in cast(Any, training))
    check_positions(longest, model.config)
    for blocks in judged.values():
        check_ids(blocks, _vocabulary(model))
        check_positions(blocks.shape[1], model.config)


def _vocabulary(model: PreTrainedModel) -> int:
    return int(Anatomy(model).embedding.weight.shape[0])
