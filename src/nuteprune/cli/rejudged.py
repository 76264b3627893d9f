"""What a recovered model is judged by: the text that its record's figures are of, if possible."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.cli.job import Job
from nuteprune.cli.output import Output
from nuteprune.cli.sources import locate
from nuteprune.errors import UserError
from nuteprune.export.record import FILE_NAME, read_record
from nuteprune.model.anatomy import Anatomy
from nuteprune.train.data import held_out_blocks


def record_of(model: str) -> dict[str, Any] | None:
    """Return the record of a pruned model, None for any other."""
    where = Path(locate(model))
    if not where.is_dir():
        try:
            where = Path(hf_hub_download(model, FILE_NAME)).parent
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError):
            return None
    return read_record(where) if (where / FILE_NAME).is_file() else None


def judged_text(
    job: Job,
    record: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    output: Output,
) -> dict[str, Tensor]:
    """Return held-out blocks: of what was asked for, else as the pruned model was judged."""
    size: dict[str, Any] = {
        "length": job.length,
        "count": job.eval_blocks,
        "vocab_size": Anatomy(model).embedding.weight.shape[0],
    }
    if job.eval_data is None and record is not None:
        config = record.get("config", {})
        if "data" in config:
            size |= {"length": config["length"], "count": config.get("eval_blocks", size["count"])}
            text = config.get("eval_data") or config["data"]
            try:
                return held_out_blocks(
                    text, tokenizer, text_column=config.get("text_column"), **size
                )
            except UserError as error:
                output.line(f"Note    judged by {job.data}, since the text of the record: {error}")
    spec = job.eval_data or job.data
    return held_out_blocks(spec, tokenizer, text_column=job.text_column, **size)


def judged_again(old: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record's perplexities: the intact model's stay where the text is the same."""
    found = entry["perplexity"]
    same = old.get("protocol") == found["protocol"] and set(old["after"]) == set(found["after"])
    return {
        "before": old["before"] if same else {},
        "after": found["after"],
        "protocol": found["protocol"],
    }
