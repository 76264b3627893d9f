"""A family's entry, proposed by looking at small models: their sizes, and what flows where.

Which axis a projection has is read off its size, as one dimension of the config changes after the
other. Which norm serves what is read off one forward pass: a tensor that one module puts out and
another reads. Nothing is taken from names, except where two readings fit equally well.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import takewhile
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nuteprune.errors import UserError
from nuteprune.model.axes import Axes, base_config
from nuteprune.model.family import CONFIG_NAMES, Family, Projection
from nuteprune.model.small import Passed, names_of, small_config, small_model, watch

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
"""What configs call the MLP's activation function."""
Norm = Literal["rms", "rms_1p", "layer", "layer_1p"]


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
    axes = Axes(config, model, passed)
    blocks = axes.blocks()
    found = _norms(passed, blocks, axes.head_dim)
    norm = _norm_kind(model.get_submodule(passed.final_norm), axes.hidden)
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
        head_dim_from_hidden=axes.head_dim_from_hidden and not fills_width,
        heads_divide_hidden=_heads_divide(config, small),
        config_names=MappingProxyType({word: names[word] for word in words}),
        activation=next((x for x in ACTIVATIONS if hasattr(small, x)), ACTIVATIONS[0]),
        **found,
        **_scales(small, passed),
    )
    first, *others = entry.attention
    if "kv_heads" in names or first.rows != ("q", "kv", "kv"):
        return [entry]
    # The other reading of queries, keys and values in one module: head by head.
    return [entry, replace(entry, attention=(replace(first, rows=("qkv",)), *others))]


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


def _norms(
    passed: Passed, blocks: dict[str, tuple[Projection, ...]], head_dim: int
) -> dict[str, Any]:
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
    raise UserError(
        f"{config.model_type} does something to its logits that its config does not state as "
        "a factor or a bound"
    )


def _is_multiple(ours: Tensor, theirs: Tensor, value: float) -> bool:
    """Return whether one tensor is another times a value."""
    ratio = float((ours * theirs).sum() / theirs.square().sum())
    multiple = torch.allclose(ours, ratio * theirs, rtol=1e-3, atol=1e-4)
    return multiple and math.isclose(ratio, value, rel_tol=1e-3)
