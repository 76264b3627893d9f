"""Pruned checkpoints: from tensors to a model, to a folder and back."""

from __future__ import annotations

import json
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nuteprune.errors import UserError
from nuteprune.export import modeling_pruned
from nuteprune.export.config import PREFIX, pruned_config
from nuteprune.files import SUMS, damage, sync, sync_tree, write_sums, writing
from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES, family_named
from nuteprune.model.shape import Shape
from nuteprune.shrink.finalize import fold_masks
from nuteprune.shrink.slicing import slice_state

__all__ = ["assemble", "build", "load_config", "load_pruned", "pruned_config", "recount", "save"]

_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    StrictDataclassError,
)


def build(config: PreTrainedConfig, state_dict: Mapping[str, Tensor]) -> PreTrainedModel:
    """Make a model of the tensors in `state_dict`, which it holds without a copy.

    Args:
        config: what `pruned_config` returned.
        state_dict: all parameters by name, of one dtype and on one device; tied weights need be
            there only once.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: if the tensors are not those that the config asks for.
    """
    first = next(iter(state_dict.values()))
    model = _load(
        _causal_lm(config.model_type),
        None,
        config=config,
        state_dict=dict(state_dict),
        dtype=first.dtype,
        device_map={"": first.device},
    )
    # It notes that no tensor was renamed on the way in, and would then rename none in files, whose
    # names are those of older versions (GPT-NeoX: embed_out, not lm_head).
    vars(model).pop("_weight_conversions", None)
    return model


def assemble(anatomy: Anatomy, masks: Masks) -> tuple[PreTrainedModel, Shape]:
    """Cut an intact or re-fitted model down to what masks keep.

    Args:
        anatomy: a model without adapters; it is used up.
        masks: final masks in an exportable shape, on the model's device.

    Returns:
        The smaller model and its dimensions.
    """
    fold_masks(anatomy, masks)
    state, shape, epsilon = slice_state(anatomy, masks)
    config = pruned_config(anatomy.config, anatomy.family, shape, epsilon=epsilon)
    return build(config, state), shape


@torch.no_grad()
def round_as_stored(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model's parameters the values that a file of a dtype will hold; it computes as before.

    Buffers, such as rotary frequencies, are made anew when a file is loaded, and stay as they are.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def load_pruned(source: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a causal LM, pruned or stock, without running code that comes with it.

    Args:
        source: a folder or the name of a model on the hub.
        kwargs: what `from_pretrained` takes, such as `dtype` or `device_map`.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: if files are missing or damaged, or weights and config disagree.
    """
    source = str(source)
    with _one_line(source):
        config, _ = PreTrainedConfig.get_config_dict(source, **kwargs)
    model_type = config.get("model_type", "")
    if not model_type.startswith(PREFIX):
        model = _load(AutoModelForCausalLM, source, trust_remote_code=False, **kwargs)
    else:
        model = _load(_causal_lm(model_type), source, use_safetensors=True, **kwargs)
    # Last, since what does not fit can be told more clearly.
    check_pruned(Path(source))
    return model


def check_pruned(folder: Path) -> None:
    """Refuse a checkpoint whose config or weights are not what `save` wrote.

    Raises:
        UserError: naming the file.
    """
    if found := damage(folder, lambda name: name == "config.json" or ".safetensors" in name):
        raise UserError(
            f"{found}; take the file from where it came, or, if you changed it on purpose, remove "
            f"its line from {folder / SUMS}"
        )


def load_config(source: str | os.PathLike[str]) -> PreTrainedConfig:
    """Load the config of a causal LM, pruned or stock, without running code that comes with it.

    Raises:
        UserError: if it is missing or damaged, or its model type is not supported.
    """
    source = str(source)
    with _one_line(source):
        values, _ = PreTrainedConfig.get_config_dict(source)
    config_class: Any = _causal_lm(values.get("model_type", "")).config_class
    with _one_line(source):
        return config_class.from_dict(values)  # type: ignore[no-any-return]


def _causal_lm(model_type: str) -> type[PreTrainedModel]:
    name = family_named(model_type).causal_lm
    if model_type.startswith(PREFIX):
        return getattr(modeling_pruned, f"Pruned{name}")  # type: ignore[no-any-return]
    return getattr(transformers, name)  # type: ignore[no-any-return]


def _load(model_class: Any, source: str | None, **kwargs: Any) -> PreTrainedModel:
    """Call `from_pretrained`, but refuse what it would make up: weights that do not fit."""
    with _one_line(source or "the pruned model"), _quiet():
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    # Stock checkpoints may carry more than their class reads, and always have; but no projections.
    stock = model_class is AutoModelForCausalLM
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": [
            name
            for name in sorted(info["unexpected_keys"])
            if not stock or _is_projection(name, model.config.model_type)
        ],
        "of another size": [
            f"{name} {list(given)}, not {list(asked)}"
            for name, given, asked in sorted(info["mismatched_keys"])
        ],
    }
    if any(wrong.values()):
        found = "; ".join(f"{kind}: {_some(names)}" for kind, names in wrong.items() if names)
        raise UserError(f"weights and config of {source or 'the pruned model'} disagree: {found}")
    return model  # type: ignore[no-any-return]


def _is_projection(name: str, model_type: str) -> bool:
    """Return whether a tensor is of a decoder projection of a supported family."""
    family = FAMILIES.get(model_type)
    return family is not None and any(
        f"{family.layers}." in name and name.endswith((f".{p.path}.weight", f".{p.path}.bias"))
        for p in family.projections
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Turn what readers raise over missing, damaged or senseless files into one line."""
    try:
        yield
    except UnpicklingError as error:  # torch's own words say how to run the code after all
        raise UserError(
            f"cannot load {source}: its weights are a pickle that is damaged, or asks for more "
            "than tensors, which is not done; pass a checkpoint with safetensors"
        ) from error
    except _UNREADABLE as error:
        raise UserError(f"cannot load {source}: {textwrap.shorten(str(error), 300)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting at length what `_load` says in a line."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def save(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    files: Mapping[str, str] = MappingProxyType({}),
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint that transformers 4.57 and 5 read; a save cut short leaves none.

    Everything is written next to the folder and moved in when it is on the disk, config.json last.

    Args:
        model: what `build` or `load_pruned` returned.
        folder: where to; absent, empty, or with nothing but `run/` in it.
        tokenizer: the tokenizer to save along.
        files: further text files, name -> content.
        max_shard_size: size at which the weights are split into several files.

    Raises:
        UserError: if the folder holds other files or nothing can be written there.
        RunFailed: if writing went wrong on the way, as where the disk is full.
    """
    folder = Path(folder).resolve()  # "." has no name, and so no sibling
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder, "make room and do the same again; for a run, with --resume"):
        _write_beside(partial, folder, model, tokenizer, files, max_shard_size)


def _write_beside(
    partial: Path,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    files: Mapping[str, str],
    max_shard_size: str,
) -> None:
    try:
        present = sorted({x.name for x in folder.iterdir()} - {"run"}) if folder.exists() else []
        if present:
            raise UserError(f"{folder} is not empty ({_some(present)}); name another folder")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        _edit(partial / "config.json", lambda config: config | _rope_keys_of_4(model.config))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
            _edit(partial / "tokenizer_config.json", _tokenizer_keys_of_4)
        write_sums(partial)
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(source: Path, folder: Path) -> None:
    """Move a folder's items into another, config.json last and only when the rest is on disk."""
    folder.mkdir(exist_ok=True)
    sync_tree(source)
    for item in list(source.iterdir()):
        if item.name != "config.json":
            item.replace(folder / item.name)
    sync(folder)
    (source / "config.json").replace(folder / "config.json")
    sync(folder)


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    content = change(json.loads(path.read_text(encoding="utf-8")))
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _rope_keys_of_4(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rope keys of transformers 4, which takes defaults in silence without them."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    # Some types have one set of parameters per kind of attention.
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention")
    names = family_named(config.model_type).rope_names
    keys = {name: full[key] for key, name in names.items() if key in full}
    if sliding:
        keys["rope_local_base_freq"] = sliding["rope_theta"]
    if full["rope_type"] == "default":
        return keys
    if full["rope_type"] == "longrope":  # 4.57 demands exactly these three
        factors = {key: full[key] for key in ("short_factor", "long_factor")}
        return keys | {"rope_scaling": {"type": "longrope", **factors}}
    return keys | {"rope_scaling": {k: v for k, v in full.items() if k not in names}}


def _tokenizer_keys_of_4(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's config under the names that transformers 4 knows, and 5 as well."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    own_code = config.get("auto_map") or {}
    if isinstance(own_code.get("AutoTokenizer"), str):  # 5.24 writes it so, and cannot read it
        config["auto_map"] = own_code | {"AutoTokenizer": [own_code["AutoTokenizer"], None]}
    return config


def recount(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Count the parameters that were written, from the headers of the weight files.

    Args:
        folder: a checkpoint.

    Returns:
        `{"total": int, "tensors": {name: shape}}`; tied weights are in the files once.

    Raises:
        UserError: if there are no weights or a file is damaged.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise UserError(f"no weights (*.safetensors) in {folder}")
    tensors: dict[str, list[int]] = {}
    for path in paths:
        with _one_line(str(path)), safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return {"total": sum(map(math.prod, tensors.values())), "tensors": tensors}
