"""Save: the smaller model as a checkpoint that others load, with its record and its card."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from nuteprune.export import checkpoint
from nuteprune.export.card import inherited_licence
from nuteprune.export.loading import FAMILY
from nuteprune.export.record import SCHEMA, blocks_recount, weights_size, write_texts
from nuteprune.gates.budget import Budget, share_gone
from nuteprune.memory import peak
from nuteprune.model.lookup import brought_along, of_language_model
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
    target: float,
    around: Around | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Write a smaller model with its record and its card; counts come from what was written.

    Args:
        sliced: the model, which takes the dtype that it is stored in.
        folder: absent, empty, or with nothing but `run/` in it.
        tokenizer: the model's.
        budget: what the dense model's parameters were counted by.
        parameters: `before`, all of the dense model, tied ones once; of a mixture also
            `active_before`, `active_after`: what a token goes through.
        stored_dtype: dtype of the file.
        target: sparsity asked for.
        around: the other parts of the source checkpoint; None: there are none.
        **rest: further keys of the record: `base_model`, shapes, seconds, seed, config and so on.
            `license` is read from the base model's card where it is not given; None where that is
            unknown.

    Returns:
        The record as it was written.

    Raises:
        UserError: if the folder holds other files.
    """
    model, before = checkpoint.as_stored(sliced.model, stored_dtype), budget.shape
    checkpoint.save(model, folder, tokenizer, around)
    counted = checkpoint.recount(folder)
    params = {"blocks_before": budget.before, **parameters, "after": counted["total"]}
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
    rest = {"peak_memory_bytes": peak(), "perplexity": {"before": {}, "after": {}}, **rest}
    full = {
        "schema": SCHEMA,
        "target": target,
        "sparsity": share_gone(params["blocks_before"], params["blocks_after"]),
        "total_sparsity": share_gone(params["before"], params["after"]),
        "params": params,
        "layers": [
            {**layer.to_dict(), "attention": layer.mixes, "mlp": layer.mlp}
            for layer in sliced.shape.layers
        ],
        "hidden": {"before": before.hidden, "after": sliced.shape.hidden},
        "layers_before": before.to_dict()["layers"],
        **rest,
        "bytes_on_disk": weights_size(folder),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("nuteprune", "torch", "transformers", "peft")},
        },
    }
    return write_texts(folder, model, full)
