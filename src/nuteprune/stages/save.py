"""Save: the smaller model as a checkpoint that others load, with its record and its card."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.export import checkpoint
from nuteprune.export.card import inherited_licence
from nuteprune.export.loading import FAMILY
from nuteprune.export.record import SCHEMA, blocks_recount, weights_size, write_texts
from nuteprune.gates.budget import Budget, share_gone
from nuteprune.memory import peak
from nuteprune.model.lookup import brought_along, of_language_model
from nuteprune.model.shape import Shape
from nuteprune.stages.slice import Sliced

if TYPE_CHECKING:
    from nuteprune.export.wrapping import Around


def save(
    sliced: Sliced,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    budget: Budget,
    parameters: Mapping[str, int],
    stored_dtype: torch.dtype,
    around: Around | None = None,
    **record: Any,
) -> dict[str, Any]:
    """Write a smaller model; its counts are those of the written files.

    Args:
        sliced: the model, which takes the dtype that it is stored in.
        folder: absent, empty, or with nothing but `run/` in it.
        tokenizer: the model's.
        budget: what the dense model's parameters were counted by.
        parameters: `before`, those of the dense model, and what a token goes through.
        stored_dtype: dtype of the file.
        around: the other parts of the source checkpoint; None: there are none.
        **record: further keys of the record.

    Returns:
        The record as it was written.

    Raises:
        UserError: if the folder holds other files.
    """
    record.setdefault("perplexity", {"before": {}, "after": {}})
    return write_pruned(
        folder,
        checkpoint.as_stored(sliced.model, stored_dtype),
        tokenizer,
        around=around,
        params={"blocks_before": budget.before, **parameters},
        before=budget.shape,
        after=sliced.shape,
        **record,
    )


def write_pruned(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    params: Mapping[str, int],
    around: Around | None = None,
    *,
    target: float,
    before: Shape,
    after: Shape,
    **rest: Any,
) -> dict[str, Any]:
    """Write a pruned checkpoint with its record and its card; counts come from what was written.

    Args:
        folder: where to; see `checkpoint.save`.
        model: the pruned model, in the dtype that it is to be stored in.
        tokenizer: its tokenizer, if it has one.
        params: `before` (all, tied once) and `blocks_before`, counted on the dense model; of a
            mixture also `active_before`, `active_after`: what a token goes through.
        around: the other parts of the model's checkpoint, written with it; None: none.
        target: sparsity asked for.
        before: dimensions of the dense model.
        after: dimensions of the pruned one.
        **rest: further keys of the record: `base_model`, shapes, seconds, seed, config and so on.
            `license` is read from the base model's card where it is not given; None where that is
            unknown.

    Returns:
        The record as it was written.
    """
    checkpoint.save(model, folder, tokenizer, around)
    counted = checkpoint.recount(folder)
    params = {**params, "after": counted["total"]}
    params["blocks_after"] = blocks_recount(counted["tensors"], model.config.model_type)
    if around is not None:
        own = of_language_model(counted["tensors"])
        params["before"] += counted["total"] - sum(map(math.prod, own.values()))
        rest["wrapper"] = around.wrapper.conditional
    if "license" not in rest:
        rest |= inherited_licence(rest.get("base_model"))
    if family := brought_along(model.config.model_type):
        from nuteprune.model.family_file import to_dict

        rest[FAMILY] = to_dict(family)
    rest.setdefault("peak_memory_bytes", peak())
    full = {
        "schema": SCHEMA,
        "target": target,
        "sparsity": share_gone(params["blocks_before"], params["blocks_after"]),
        "total_sparsity": share_gone(params["before"], params["after"]),
        "params": params,
        "layers": [
            {**layer.to_dict(), "attention": layer.mixes, "mlp": layer.mlp}
            for layer in after.layers
        ],
        "hidden": {"before": before.hidden, "after": after.hidden},
        "layers_before": before.to_dict()["layers"],
        **rest,
        "bytes_on_disk": weights_size(folder),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("nuteprune", "torch", "transformers", "peft")},
        },
    }
    return write_texts(folder, model, full)
