"""A family's entry, proposed by looking at small models: their sizes, and what flows where.

Which axis a projection has is read off its size. Which norm serves what is read off one forward
pass: a tensor that one module puts out and another reads. Nothing is taken from names, except where
two readings fit equally well.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nuteprune.errors import UserError
from nuteprune.model.family import CONFIG_NAMES, Family, Projection
from nuteprune.model.small import (
    SIZES,
    Passed,
    base_config,
    names_of,
    small_config,
    small_model,
    watch,
)

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
"""What configs call the MLP's activation function."""
Norm = Literal["rms", "rms_1p", "layer", "layer_1p"]
Blocks = dict[str, tuple[Projection, ...]]
"""`attention` and `mlp` -> their projections, in the order in which they are called."""


def propose(config: PreTrainedConfig) -> list[Family]:
    """Return entries that may describe a model type, the likeliest first, to be checked.

    Args:
        config: a config of the type; its sizes do not matter.

    Raises:
        UserError: if the type is none that an entry can describe, with the reason.
    """
    small, fills_width = base_config(config)
    model = small_model(small)
    passed = watch(model)
    blocks, head_dim = _find_blocks(model, passed)
    hidden = passed.embedded.shape[-1]
    found = _norms(passed, blocks, head_dim)
    norm = _norm_kind(model.get_submodule(passed.final_norm), hidden)
    names = names_of(small.to_dict())
    not_read = {"epsilon"} if norm.startswith("layer") else set()
    words = [x for x in CONFIG_NAMES if x in names and x not in not_read]
    entry = Family(
        model_type=config.model_type,
        causal_lm=type(model).__name__,
        attention=blocks["attention"],
        mlp=blocks["mlp"],
        layers=passed.layers,
        embedding=passed.embedding,
        final_norm=passed.final_norm,
        norm=norm,
        attention_module=_common(blocks["attention"]),
        mlp_modules=_modules(blocks["mlp"]),
        heads_fill_width=fills_width,
        head_dim_from_hidden=head_dim * SIZES["heads"] == hidden and not fills_width,
        heads_divide_hidden=_heads_divide(config, small),
        config_names={word: names[word] for word in words},
        activation=next((x for x in ACTIVATIONS if hasattr(small, x)), ACTIVATIONS[0]),
        **found,
        **_scales(small, passed),
    )
    first, *others = entry.attention
    if "kv_heads" in names or first.rows != ("q", "kv", "kv"):
        return [entry]
    # The other reading of queries, keys and values in one module: head by head.
    return [entry, replace(entry, attention=(replace(first, rows=("qkv",)), *others))]


def _find_blocks(model: PreTrainedModel, passed: Passed) -> tuple[Blocks, int]:
    """Find the axes of a layer's projections by their sizes, no two of which are alike.

    Args:
        model: a small model, from `base_config`.
        passed: what a forward pass of it showed.

    Returns:
        The blocks, and the features of a head.

    Raises:
        UserError: if layers differ or have other blocks, or a projection is none that an entry can
            state.
    """
    config, sizes = model.config, _linears(model, passed)
    names = names_of(config.to_dict())
    if "heads" not in names:
        raise UserError(f"{config.model_type} states no number of attention heads")
    hidden, neurons = passed.embedded.shape[-1], SIZES["neurons"]
    mlp = [x for x in passed.called if sizes[x][1] == neurons or sizes[x][0] % neurons == 0]
    attention = [x for x in passed.called if x not in mlp]
    unused = sizes.keys() - set(passed.called)
    if unused or min(len(attention), len(mlp)) < 2:
        raise UserError(
            f"{config.model_type} has no layers of one attention and one MLP block whose "
            "projections are linear modules"
        )
    *makes_heads, writes = attention
    rows, queries = sizes[writes]
    head_dim, rest = divmod(queries, getattr(config, names["heads"]))
    if rows != hidden or rest:
        raise UserError(f"{writes} does not write heads to the residual stream")
    keys = head_dim * getattr(config, names["kv_heads"]) if "kv_heads" in names else None
    made = [
        Projection(x, _heads_of(x, sizes[x], hidden, queries, keys), "hidden") for x in makes_heads
    ]
    blocks = {
        "attention": (*made, Projection(writes, ("hidden",), "q")),
        "mlp": tuple(_of_mlp(x, sizes[x], hidden) for x in mlp),
    }
    return blocks, head_dim


def _of_mlp(path: str, size: tuple[int, int], hidden: int) -> Projection:
    neurons = SIZES["neurons"]
    if size == (hidden, neurons):
        return Projection(path, ("hidden",), "neurons")
    if size[1] == hidden:
        return Projection(path, ("neurons",) * (size[0] // neurons), "hidden")
    raise UserError(f"{path} of {size} is neither read nor written by one MLP width")


def _heads_of(
    path: str, size: tuple[int, int], hidden: int, queries: int, keys: int | None
) -> tuple[str, ...]:
    """Return what makes up a projection's rows, where all heads have so many queries and keys."""
    rows, columns = size
    if keys is None:
        is_query = re.search(r"q(uery)?(_|$)", path.rpartition(".")[2])
        known = {queries: ("q",) if is_query else ("kv",), 3 * queries: ("q", "kv", "kv")}
    else:
        known = {keys: ("kv",), queries: ("q",), queries + 2 * keys: ("q", "kv", "kv")}
    if columns != hidden or rows not in known:
        raise UserError(f"{path} of {rows} x {columns} is not of whole heads that read the stream")
    return known[rows]


def _linears(model: PreTrainedModel, passed: Passed) -> dict[str, tuple[int, int]]:
    """Return path -> (rows, columns) of a layer's linear modules, checked to be alike in all."""
    found, kind = [], model.config.model_type
    for layer in model.get_submodule(passed.layers).children():
        modules = dict(layer.named_modules())
        if conv := [path for path, x in modules.items() if isinstance(x, Conv1D)]:
            raise UserError(
                f"{kind} keeps its weights transposed (Conv1D, in {conv[0]}), which no entry states"
            )
        linears = {path: x for path, x in modules.items() if isinstance(x, nn.Linear)}
        found.append({path: (x.out_features, x.in_features) for path, x in linears.items()})
    if any(x.keys() != found[0].keys() for x in found):
        raise UserError(f"{kind} has layers of several kinds, which no entry states")
    return found[0]


def _common(projections: tuple[Projection, ...]) -> str:
    """Return the module that projections have in common, below the layer."""
    parents = [x.path.split(".")[:-1] for x in projections]
    alike = takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    shared = ".".join(names[0] for names in alike)
    if not shared:
        raise UserError(f"{projections[0].path} and its like are in no module of their own")
    return shared


def _modules(projections: tuple[Projection, ...]) -> tuple[str, ...]:
    """Return the modules that make up an MLP: one, or its projections where it has none."""
    if all("." in x.path for x in projections):
        return (_common(projections),)
    return tuple(x.path for x in projections)


def _norms(passed: Passed, blocks: Blocks, head_dim: int) -> dict[str, Any]:
    """Return which norms serve which block, and those of queries and keys."""
    serves: dict[str, list[str]] = {"attention": [], "mlp": [], "both": []}
    post: dict[str, str] = {}
    inside: list[str] = []
    for norm in passed.norms:
        if norm.startswith(f"{_common(blocks['attention'])}."):
            inside.append(norm)
            continue
        readers = [name for name, x in blocks.items() if passed.reads(x[0].path, norm)]
        writer = [name for name, x in blocks.items() if passed.reads(norm, x[-1].path)]
        if len(readers) == 2:
            serves["both"].append(norm)
        elif readers:
            serves[readers[0]].insert(0, norm)
        elif writer:
            post[writer[0]] = norm
        else:
            raise UserError(f"the norm {norm} neither feeds one of the blocks nor follows one")
    if len(post) == 1:
        raise UserError(f"{next(iter(post.values()))} norms what one block writes, not the other")
    for name, norm in post.items():
        serves[name].append(norm)
    return {
        "attention_norms": tuple(serves["attention"]),
        "mlp_norms": tuple(serves["mlp"]),
        "shared_norms": tuple(serves["both"]),
        "post_norms": (post["attention"], post["mlp"]) if post else None,
        "qk_norms": tuple(inside),
        "joint_qk_norms": any(passed.inputs[x].shape[-1] != head_dim for x in inside),
    }


@torch.no_grad()
def _norm_kind(norm: nn.Module, width: int) -> Norm:
    """Return what a norm computes, told by its outputs."""
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(2))
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    y = norm(x) if bias is None else norm(x) - bias
    centred = torch.allclose(norm(x + 3.0), norm(x), atol=1e-4)
    x = x - x.mean(-1, keepdim=True) if centred else x
    unit = x * (x.square().mean(-1, keepdim=True) + 1e-12).rsqrt()
    if torch.allclose(unit if weight is None else unit * weight, y, atol=1e-2):
        return "layer" if centred else "rms"
    if weight is not None and torch.allclose(unit * (1 + weight), y, atol=1e-2):
        return "layer_1p" if centred else "rms_1p"
    raise UserError(f"{type(norm).__name__} is neither RMSNorm (w or 1 + w) nor LayerNorm")


def _heads_divide(config: PreTrainedConfig, small: PreTrainedConfig) -> bool:
    """Return whether the stock class refuses a number of heads that does not divide the width."""
    stated = getattr(small, "head_dim", None)
    try:
        small_model(small_config(config, heads=5, kv_heads=5, head_dim=stated))
    except UserError:
        return True
    return False


def _scales(config: PreTrainedConfig, passed: Passed) -> dict[str, Any]:
    """Return what multiplies embeddings and logits, by the config's names.

    Raises:
        UserError: if something multiplies them that the config does not state.
    """
    found: dict[str, Any] = {}
    if _is_multiple(passed.entered, passed.embedded, passed.entered.shape[-1] ** 0.5):
        found["scaled_embedding"] = True
    raw, logits = passed.raw, passed.logits
    if torch.allclose(raw, logits, atol=1e-5):
        return found
    numbers = {k: v for k, v in config.to_dict().items() if isinstance(v, float) and v > 0}
    for name, value in numbers.items():
        if "logit" in name and _is_multiple(logits, raw, value):
            return found | {"logit_multiplier": name}
        if "logit" in name and _is_multiple(logits, raw, 1 / value):
            return found | {"logit_divisor": name}
        if "cap" in name and torch.allclose(value * torch.tanh(raw / value), logits, atol=1e-4):
            return found | {"logit_softcap": name}
    raise UserError(f"{config.model_type} changes its logits by more than its config states")


def _is_multiple(ours: Tensor, theirs: Tensor, value: float) -> bool:
    """Return whether one tensor is another times a value."""
    ratio = float((ours * theirs).sum() / theirs.square().sum())
    multiple = torch.allclose(ours, ratio * theirs, rtol=1e-3, atol=1e-4)
    return multiple and math.isclose(ratio, value, rel_tol=1e-3)
