"""Pruned checkpoints: models cut down to their masks, written to a folder, and counted there."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nuteprune.errors import UserError, some
from nuteprune.export.config import keys_of_4, pruned_config
from nuteprune.export.loading import build, one_line
from nuteprune.files import follow_umask, sync, sync_tree, write_sums, writing
from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import PREFIX
from nuteprune.model.lookup import all_brought_along
from nuteprune.model.shape import Shape
from nuteprune.run_folder import RUN, SUMS, hidden
from nuteprune.shrink.slicing import Tensors, cut_state, narrower_epsilon, shape_of

if TYPE_CHECKING:
    from nuteprune.export.wrapping import Around

PARTIAL = ".partial"
"""Folder in which a checkpoint is written before it is moved to its place."""
SHARD = 5 * 10**9
"""Bytes at which weights are split into several files."""
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
"""A tensor of one expert: its layer's stack, its number, its projection."""


def assemble(
    anatomy: Anatomy, masks: Masks, state: Tensors | None = None
) -> tuple[PreTrainedModel, Shape]:
    """Make the model that a dense or refitted one is when masks have cut it.

    Args:
        anatomy: a model without adapters; it is used up.
        masks: final masks in an exportable shape.
        state: the weights that are left; None: those of the model, cut here.

    Returns:
        The smaller model and its dimensions.
    """
    shape, epsilon = shape_of(masks), narrower_epsilon(anatomy, masks)
    config = pruned_config(anatomy.config, anatomy.family, shape, epsilon=epsilon)
    small = build(config, cut_state(anatomy, masks) if state is None else state)
    small.generation_config = copy.deepcopy(anatomy.model.generation_config)
    return small, shape


@torch.no_grad()
def round_as_stored(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round a model's parameters to what a file of a dtype will hold; its own dtype stays.

    Buffers, such as rotary frequencies, are made anew when a file is loaded, and stay as they are.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def rounded_as_stored(part: Tensors, dtype: torch.dtype) -> Tensors:
    """Return tensors by name as `round_as_stored` gives parameters their values."""
    spared = _buffers()
    return {
        name: x if name.endswith(spared) else x.to(dtype).to(x.dtype) for name, x in part.items()
    }


def _buffers() -> tuple[str, ...]:
    """Return the endings of buffers' names in files, of all families known by now."""
    known = (*FAMILIES.values(), *all_brought_along())
    return tuple(f".{path}" for family in known for path in family.buffers)


def as_stored(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give a model's parameters the dtype of a file, in place, and return it.

    Unlike `model.to(dtype)` this spares buffers: bfloat16 would change rotary frequencies.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def save(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    around: Around | None = None,
    *,
    max_shard_size: int | str = SHARD,
) -> None:
    """Write a checkpoint that transformers 4.57 and 5 read; a save cut short leaves none.

    Everything is written to a folder inside and moved out of it when it is on the disk: the sums
    first, which name the rest, and config.json last. The config of a stock model names no code:
    what came with the base model does not travel along.

    Args:
        model: what `build` or `load_pruned` returned.
        folder: where to; absent, empty, or with nothing but `run/` and hidden files in it.
        tokenizer: the tokenizer to save along.
        around: the other parts of the model's checkpoint, which go around it; None: none.
        max_shard_size: size at which the weights are split into several files, such as "20KB".

    Raises:
        UserError: if the folder holds other files or nothing can be written there.
        RunFailed: if writing went wrong on the way, as where the disk is full.
    """
    if around is not None:
        model = around.put(model)
    folder = Path(folder)
    partial = folder / PARTIAL  # beside it might be another file system
    with writing(folder, "make room and do the same again; for a run, with --resume"):
        there = folder.iterdir() if folder.exists() else ()
        if present := sorted({x.name for x in there if not hidden(x)} - {RUN}):
            raise UserError(f"{folder} is not empty ({some(present)}); name another folder")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            model.generation_config = _savable(model.generation_config)
            if not model.config.model_type.startswith(PREFIX):
                vars(model.config).pop("auto_map", None)
            model.save_pretrained(partial, max_shard_size=max_shard_size)
            _add_keys_of_4(partial / "config.json", model.config)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
                save_tokenizer_for_4(partial)
            if around is not None:
                around.copy_processor(partial)
            follow_umask(partial)
            write_sums(partial)
            _move(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _add_keys_of_4(path: Path, config: PreTrainedConfig) -> None:
    """Add keys for transformers 4 to a config's file, or to its language model's part."""
    inner = config.get_text_config()

    def added(content: dict[str, Any]) -> dict[str, Any]:
        if inner is config:
            return content | keys_of_4(config)
        return content | {"text_config": content["text_config"] | keys_of_4(inner)}

    edit_json(path, added, sort_keys=True)


def save_tokenizer_for_4(folder: Path) -> None:
    """Rewrite the tokenizer files in a folder so that transformers 4 reads them, and 5 still does.

    Args:
        folder: where a tokenizer was saved; files that are not there are passed over.
    """
    edit_json(folder / "tokenizer_config.json", _names_of_4, sort_keys=True)
    edit_json(folder / "tokenizer.json", plain_merges)


def _names_of_4(config: dict[str, Any]) -> dict[str, Any]:
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


def plain_merges(content: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer whose merges are lines of two tokens, not pairs.

    tokenizers before 0.20, which transformers up to 4.44 needs, reads no others. A tokenizer that
    has a token with a space in it stays as it is: only pairs can state its merges.
    """
    model = content.get("model", {})
    merges = model.get("merges", [])
    in_lines = any(isinstance(merge, str) for merge in merges)
    if not merges or in_lines or any(" " in token for merge in merges for token in merge):
        return content
    return content | {"model": model | {"merges": [" ".join(merge) for merge in merges]}}


def edit_json(
    path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], sort_keys: bool = False
) -> None:
    """Write a JSON file with other content, if it is there."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if (new := change(content)) == content:
        return
    text = json.dumps(new, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _savable(settings: GenerationConfig) -> GenerationConfig:
    """Return settings of generation without those that transformers refuses to save.

    Older models have such settings, for example a temperature without sampling.
    """
    kept = GenerationConfig()
    given = settings.to_diff_dict()
    # First what others are judged by.
    for name in sorted(given, key=lambda x: x not in ("do_sample", "num_beams")):
        tried = copy.deepcopy(kept)
        setattr(tried, name, given[name])
        with suppress(ValueError):
            tried.validate(strict=True)
            kept = tried
    return kept


def _move(source: Path, folder: Path) -> None:
    """Move a folder's items into another, config.json last and only when the rest is on disk."""
    sync_tree(source)
    (source / SUMS).replace(folder / SUMS)
    for item in list(source.iterdir()):
        if item.name != "config.json":
            item.replace(folder / item.name)
    sync(folder)
    (source / "config.json").replace(folder / "config.json")
    sync(folder)


def header_bytes(tensors: Mapping[str, tuple[Sequence[int], int]], dtype: torch.dtype) -> int:
    """Return the most that a checkpoint's weight files hold beside the weights.

    Args:
        tensors: name -> (shape, elements) of each tensor; those that are written are no larger.
        dtype: of the file.
    """
    total = sum(size for _, size in tensors.values()) * dtype.itemsize
    entries = {
        name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [total, total]}
        for name, (shape, _) in tensors.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"))
    return len(text.encode()) + 64 * (1 + 2 * total // SHARD)


def recount(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Count the parameters that were written, from the headers of the weight files.

    Args:
        folder: a checkpoint.

    Returns:
        `{"total": int, "tensors": {name: shape}}`; tied weights are in the files once.

    Raises:
        UserError: if there are no weights or a file is damaged.
    """
    if not (found := _sizes_in(Path(folder))):
        raise UserError(f"no weights (*.safetensors) in {folder}")
    spared = _buffers()
    tensors = {name: size for name, size in found.items() if not name.endswith(spared)}
    return {"total": sum(map(math.prod, tensors.values())), "tensors": tensors}


def _sizes_in(folder: Path) -> dict[str, list[int]]:
    """Return the size of each tensor in a folder's weight files, by name."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with one_line(str(path)), safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


def first_misfit(folder: Path) -> str | None:
    """Return the expert's tensor that is missing, or differs in size from the others.

    Some checkpoints store experts one by one. transformers stacks them when it loads them, and
    does not say which it could not stack.

    Args:
        folder: a checkpoint; its files are whole.

    Returns:
        The first that is found, in words; None where there is none.
    """
    sizes: dict[tuple[str, str], dict[int, tuple[int, ...]]] = defaultdict(dict)
    for name, size in _sizes_in(folder).items():
        if found := _EXPERT.fullmatch(name):
            stack, number, projection = found.groups()
            sizes[stack, projection][int(number)] = tuple(size)
    for (stack, projection), by_expert in sizes.items():
        usual = mode(by_expert.values())
        experts = {i for (other, _), each in sizes.items() if other == stack for i in each}
        for expert in sorted(experts):
            there, name = by_expert.get(expert), f"{stack}.{expert}.{projection}"
            if there is None:
                return f"no {name}"
            if there != usual:
                return f"{name} is {list(there)}, not {list(usual)}"
    return None
