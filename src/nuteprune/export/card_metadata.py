"""The metadata of a model card that the hub reads: base model, licence and figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from nuteprune.files import at_home
from nuteprune.run_folder import CARD

LICENCE = ("license", "license_name", "license_link")
"""What the hub's cards say of a licence; the latter two where it has no name for it (`other`)."""


def inherited_licence(base_model: str | None) -> dict[str, str | None]:
    """Return the licence from the base model's card; `license` is None if it states none.

    Args:
        base_model: a checkpoint folder or a hub id; anything else has no card.
    """
    unknown: dict[str, str | None] = {"license": None}
    if not base_model:
        return unknown
    local = at_home(base_model) / CARD
    if not local.is_file() and not _is_hub_id(base_model):
        return unknown
    try:
        source = local if local.is_file() else base_model
        data = ModelCard.load(source, ignore_metadata_errors=True).data
    except Exception:  # no network, no card, a damaged one: the licence is the base model's anyway
        return unknown
    return unknown | {key: x for key in LICENCE if isinstance(x := data.get(key), str)}


def metadata(record: Mapping[str, Any]) -> ModelCardData:
    """Return the hub's metadata: base model, licence, and the metrics as a model index."""
    base_model = record.get("base_model")
    after = record.get("perplexity", {}).get("after", {})
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source,
            dataset_name=f"{source} (held-out part)",
            metric_type="perplexity",
            metric_name="perplexity",
            metric_value=value,
        )
        for source, value in after.items()
    ]
    name = f"{short_name(base_model or 'model')}-pruned-{round(100 * record['sparsity'])}"
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if record.get("wrapper") else "text-generation",
        tags=["nuteprune", "pruned", "structured-pruning"],
        base_model=base_model if base_model and _is_hub_id(base_model) else None,
        license=record.get("license"),
        license_name=record.get("license_name"),
        license_link=record.get("license_link"),
        model_name=name if results else None,
        eval_results=results or None,
    )


def short_name(model: str) -> str:
    """Return the last part of a path or hub id."""
    return model.rstrip("/").rpartition("/")[2]


def _is_hub_id(model: str) -> bool:
    """Return whether a name has the form owner/model and is no folder here."""
    is_one = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model)  # neither ./model nor ../model
    return bool(is_one) and not Path(model).exists()
