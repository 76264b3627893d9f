"""The text to judge a recovered model by: that of its record, if possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nuteprune.console import Output
from nuteprune.data.blocks import held_out_blocks
from nuteprune.errors import UserError
from nuteprune.export.record import perplexities_of
from nuteprune.files import to_json, write_text
from nuteprune.jobs.job import RecoverJob
from nuteprune.jobs.sources import load_tokenizer
from nuteprune.judge.retention import retentions
from nuteprune.run_folder import RECORD


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
    size: dict[str, Any] = {"length": job.length, "count": job.eval_blocks}
    if job.eval_data is None and record is not None:
        config = record.get("config", {})
        if "data" in config:
            # What `vocab` wrote says what text was counted, and of no blocks.
            for key, name in (("length", "length"), ("count", "eval_blocks")):
                size[key] = config.get(name, size[key])
            text = config.get("eval_data") or config["data"]
            try:
                column = config.get("text_column")
                return None, held_out_blocks(text, tokenizer, text_column=column, **size)
            except UserError as error:
                output.line(f"Note    judged by {job.text}, since the text of the record: {error}")
    spec = job.eval_data or job.text
    return spec, held_out_blocks(spec, tokenizer, text_column=job.text_column, **size)


@dataclass(frozen=True)
class Tuned:
    """A model that was tuned and written.

    Args:
        result: what is printed: `out`, `recover`, and the record where there is one.
        work: multiply-adds with weights per token of a forward pass.
    """

    result: dict[str, Any]
    work: int


def same_tokens(tokenizer: PreTrainedTokenizerBase, dense: str, trust_remote_code: bool) -> None:
    """Refuse a dense model with other tokens, since perplexities per token would not compare.

    Args:
        tokenizer: of the pruned model.
        dense: the dense model.
        trust_remote_code: whether code that comes with its tokenizer may be run.

    Raises:
        UserError: if its tokenizer is another one.
    """
    if load_tokenizer(dense, trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--against {dense} has another tokenizer, so perplexities do not compare; pass the "
            "model that was pruned"
        )


def compared(dense: str, ours: Tuned, theirs: Tuned) -> dict[str, Any]:
    """Compare the tuned pruned model with the dense model, tuned in the same way.

    Args:
        dense: the dense model's name, as the user gave it.
        ours: the pruned model, tuned.
        theirs: the dense one.

    Returns:
        `model`, `out`, `perplexity` {`before`, `after`}, `retention` {`before`, `after`: {text:
        percent, `mean`}}, `seconds_per_step`, `time_ratio` (ours over theirs; None where a resumed
        run took no step) and `work_ratio`, the same of multiply-adds with weights.
    """
    mine, entry = ours.result["recover"], theirs.result["recover"]
    found = entry["perplexity"]
    times = mine["seconds_per_step"], entry["seconds_per_step"]
    return {
        "model": dense,
        "out": theirs.result["out"],
        "perplexity": {when: found[when] for when in ("before", "after")},
        "retention": {
            when: retentions(
                mine["perplexity"][when], found[when], dict.fromkeys(found[when], False)
            )
            for when in ("before", "after")
        },
        "seconds_per_step": times[1],
        "time_ratio": times[0] / times[1] if all(times) else None,
        "work_ratio": ours.work / theirs.work,
    }


def note(result: dict[str, Any], comparison: Mapping[str, Any]) -> None:
    """Add a comparison to a result, and to the record that was written of it, if there is one."""
    result["recover"]["against"] = dict(comparison)
    path = Path(result["out"]) / RECORD
    if path.is_file():
        write_text(path, to_json({k: x for k, x in result.items() if k != "out"}, indent=2) + "\n")


def judged_again(record: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record's perplexities: the dense model's stay where the blocks are the same."""
    found, protocol = entry["perplexity"], record.get("perplexity", {}).get("protocol")
    before, after = perplexities_of(record)
    same = protocol == found["protocol"] and set(after) == set(found["after"])
    return {
        "before": before if same else {},
        "after": found["after"],
        "protocol": found["protocol"],
    }
