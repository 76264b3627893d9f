"""The text of a recover job: what is learned and judged by, and whether a model takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.console import Output
from nuteprune.data.examples import read_examples
from nuteprune.data.held_out import held_out_blocks
from nuteprune.data.tokens import check_ids, check_positions
from nuteprune.data.training_text import training_blocks
from nuteprune.errors import UserError
from nuteprune.jobs.job import INSTRUCTIONS, RecoverJob
from nuteprune.model.anatomy import Anatomy
from nuteprune.train.config import RecoverConfig


def judged_text(
    job: RecoverJob,
    record: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    output: Output,
) -> tuple[str | None, dict[str, Tensor]]:
    """Return the text to judge by and its held-out blocks: the job's, else the record's.

    Args:
        job: the job.
        record: of the pruned model; None: it has none.
        tokenizer: the model's.
        output: prints a line if the text of the record cannot be read.

    Returns:
        The DATA spec, None for the text of the record; source name -> token ids (N, T).

    Raises:
        UserError: if the text that is left to judge by cannot be read.
    """
    config = (record or {}).get("config", {})
    size: dict[str, Any] = {"length": job.length, "count": job.eval_blocks}
    if job.eval_data is None and "data" in config:
        # What `vocab` wrote says what text was counted, and of no blocks.
        size["length"] = config.get("length", job.length)
        size["count"] = config.get("eval_blocks", job.eval_blocks)
        text, column = config.get("eval_data") or config["data"], config.get("text_column")
        try:
            return None, held_out_blocks(text, tokenizer, text_column=column, **size)
        except UserError as error:
            output.line(f"Note    judged by {job.text}, since the text of the record: {error}")
    spec = job.eval_data or job.text
    return spec, held_out_blocks(spec, tokenizer, text_column=job.text_column, **size)


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
        "seed": config.seed,
    }
    if kind == INSTRUCTIONS:
        return read_examples(job.text, tokenizer, most=count, template=job.template, **given)
    assert count is not None
    return training_blocks(job.text, tokenizer, count=count, **given)


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
