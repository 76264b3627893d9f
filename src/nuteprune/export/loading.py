"""Loads a model from files or tensors, without running code that comes with them."""

from __future__ import annotations

import copy
import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from nuteprune.errors import UserError, some
from nuteprune.export import modeling_pruned
from nuteprune.export.config import language_config
from nuteprune.export.hub import check_inside, record_path
from nuteprune.files import damage
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import NAMES, PREFIX, Family
from nuteprune.model.lookup import KEY_MAPPING, bring_along, brought_along, family_named, wrapper_of
from nuteprune.run_folder import SUMS
from nuteprune.simulated import has_data

FAMILY = "family"
"""Where a record has the entry of a family that is not listed."""
UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, SafetensorError, StrictDataclassError),
)
"""What libraries raise for a checkpoint that is damaged or has something else in it."""
MOST_LAYERS = 100_000
"""More layers than any model has."""


def build(
    config: PreTrainedConfig, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Make a model of the tensors in `state_dict`, which it holds without a copy.

    Args:
        config: what `pruned_config` returned.
        state_dict: all parameters by name, of one dtype and on one device; tied weights need be
            there only once.
        dtype: the one to compute in, as for a loaded file; None: the tensors' own.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: if the tensors are not those that the config asks for.
    """
    first = next(iter(state_dict.values()))
    kind: Any = class_of(config.model_type)
    if not has_data(first):  # a plan's
        with torch.device("meta"):
            return cast(PreTrainedModel, kind._from_config(config))
    model = _load(
        kind,
        None,
        config=config,
        state_dict=dict(state_dict),
        dtype=dtype or first.dtype,
        device_map={"": first.device},
    )
    # It notes that no tensor was renamed on the way in, and would then rename none in files, whose
    # names are those of older versions (GPT-NeoX: embed_out, not lm_head).
    vars(model).pop("_weight_conversions", None)
    return model


def unfilled(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model of a config with arbitrary finite weights, to be timed."""
    with no_init_weights():
        model: Any = class_of(config.model_type)(config)
    for parameter in model.parameters():
        parameter.data.fill_(1e-3)
    return model.eval()  # type: ignore[no-any-return]


def load_pruned(source: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a causal LM, pruned or stock, without running code that comes with it.

    For a model of several modalities, load the language model inside.

    Args:
        source: a folder or the name of a model on the hub.
        kwargs: arguments of `from_pretrained`, such as `dtype` or `device_map`; they cannot enable
            remote code, or files other than safetensors for pruned models.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: if files are missing or damaged, or weights and config disagree.
    """
    source = str(source)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("trust_remote_code", "use_safetensors")}
    with one_line(source):
        config = config_values(source, **kwargs)
    model_type = config["model_type"]
    if model_type.startswith(PREFIX):
        kwargs["use_safetensors"] = True
    if wrapper_of(model_type):
        inner = language_config(config)
        kwargs = {"config": inner, "key_mapping": KEY_MAPPING, **kwargs}
        model = _load(class_of(inner.model_type), source, stock=True, **kwargs)
    elif model_type.startswith(PREFIX):
        model = _load(class_of(model_type), source, **kwargs)
    else:
        model = _load(AutoModelForCausalLM, source, stock=True, trust_remote_code=False, **kwargs)
    with one_line(source):
        _check_routing(source, model.config)
    _check_tokens_named(source, model)
    check_inside(source, **kwargs)  # again, since the hub's files are here only now
    # Last, since what does not fit can be told more clearly.
    if found := damage(Path(source), lambda name: name == "config.json" or ".safetensors" in name):
        raise UserError(
            f"{found}; take the file from where it came, or, if you changed it on purpose, remove "
            f"its line from {Path(source) / SUMS}"
        )
    return model


@torch.no_grad()
def in_dtype(model: PreTrainedModel, dtype: torch.dtype, anew: bool = False) -> PreTrainedModel:
    """Return a model that computes as its file will, loaded in a dtype.

    Returns:
        The model itself where it is in that dtype and not wanted anew, else a copy. A copy has the
        buffers, such as rotary frequencies, of a model loaded anew.
    """
    if model.dtype == dtype and not anew:
        return model
    state = {name: x.detach() for name, x in stored_tensors(model).items()}
    copied = build(copy.deepcopy(model.config), state, dtype)
    copied.generation_config = copy.deepcopy(model.generation_config)
    return copied


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what a model's files hold, by name: parameters, tied ones once, and some buffers."""
    stored = model.state_dict().keys()
    buffers = {name: x for name, x in model.named_buffers() if name in stored}
    return dict(model.named_parameters()) | buffers


def load_config(source: str | os.PathLike[str]) -> PreTrainedConfig:
    """Load the config of a causal LM, pruned or stock, without running code that comes with it.

    Raises:
        UserError: if it is missing or damaged, or its model type is not supported.
    """
    source = str(source)
    with one_line(source):
        values = config_values(source)
        if wrapper_of(values["model_type"]):
            config = language_config(values)
        else:
            config_class: Any = class_of(values["model_type"], values).config_class
            config = config_class.from_dict(values)
        _check_routing(source, config)
    return config


def bring_recorded_family(source: str, **where: Any) -> None:
    """Register the family that a checkpoint's record describes, if any, in this process.

    Args:
        source: a folder, or the name of a model on the hub.
        where: further arguments for the hub, such as `revision`.

    Raises:
        UserError: if the description makes no sense.
    """
    if (path := record_path(source, **where)) is None:
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what reads the record says so
        return
    if isinstance(record, dict) and FAMILY in record:
        from nuteprune.model.family_file import from_dict

        bring_along(from_dict(record[FAMILY], path))


def _check_routing(source: str, config: PreTrainedConfig) -> None:
    """Refuse a mixture whose config routes a token to more experts than it has, or to none."""
    family = FAMILIES.get(config.model_type.removeprefix(PREFIX))
    if family is None or family.experts is None:
        return
    names = (family.experts.per_token, family.config_names["experts"])
    wanted, there = (getattr(config, name) for name in names)
    if not 1 <= wanted <= there:
        raise UserError(
            f"the config of {source} routes each token to {wanted} of {there} experts; mend "
            f"{names[0]} in its config.json"
        )


def _check_tokens_named(source: str, model: PreTrainedModel) -> None:
    """Refuse special tokens of a generation config that are no numbers: transformers reads any."""
    for name, value in vars(getattr(model, "generation_config", model.config)).items():
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if name.endswith("_token_id") and not all(type(x) is int for x in ids):
            raise UserError(
                f"{name} in generation_config.json of {source} is {value!r}, and has to be the "
                "number of a token or a list of such: mend it there"
            )


def config_values(source: str, **kwargs: Any) -> dict[str, Any]:
    """Return the content of config.json, and register the family that a record describes.

    Args:
        source: a folder or the name of a model on the hub.
        kwargs: what `from_pretrained` takes.

    Returns:
        The content; `model_type` is "" if it is not stated.

    Raises:
        OSError, ValueError: if there is none, or it is no config.
        UserError: if a record's description of a family makes no sense.
    """
    check_inside(source, **kwargs)
    try:
        values, _ = PreTrainedConfig.get_config_dict(source, **kwargs)
    except TypeError as error:  # it looks for keys in whatever JSON there is
        raise ValueError("its config.json is no mapping of names to values") from error
    if not values:
        raise OSError("there is no config.json, here or in the cache")
    if not isinstance(values, dict) or not isinstance(values.get("model_type", ""), str):
        raise ValueError("its config.json is no mapping that names a model_type")
    for part in (values, *(x for x in values.values() if isinstance(x, dict))):
        for name in NAMES["layers"]:  # of so many, libraries make a list before they look
            if isinstance(count := part.get(name), int) and count > MOST_LAYERS:
                raise ValueError(f"{name} is {count} in its config.json")
    where = {k: kwargs[k] for k in ("revision", "token", "cache_dir") if k in kwargs}
    bring_recorded_family(source, **where)
    return {"model_type": "", **values}


def class_of(model_type: str, config: Mapping[str, Any] | None = None) -> type[PreTrainedModel]:
    """Return the class of a type's causal LM, or of a wrapper; of a pruned one ours."""
    wrapper = wrapper_of(model_type)
    name = wrapper.conditional if wrapper else family_named(model_type, config).causal_lm
    if model_type.startswith(PREFIX):
        return getattr(modeling_pruned, f"Pruned{name}")  # type: ignore[no-any-return]
    return getattr(transformers, name)  # type: ignore[no-any-return]


def _load(
    model_class: Any, source: str | None, *, stock: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Call `from_pretrained`, but refuse weights that do not fit, which it would make up."""
    with one_line(source or "the pruned model"), without_notes():
        try:
            model, info = model_class.from_pretrained(
                source,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_kernels=False,  # the hub's would take the place of layers that have hooks
                **kwargs,
            )
        except RuntimeError as error:  # which points to a report that is not shown here
            from nuteprune.export.checkpoint import first_misfit

            if source is not None and (found := first_misfit(Path(source))):
                raise UserError(f"experts of {source} cannot be stacked: {found}") from error
            raise
    # Stock checkpoints may carry more than their class reads, and always have; but no projections.
    unread, sizes = sorted(info["unexpected_keys"]), sorted(info["mismatched_keys"])
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": [x for x in unread if not stock or _is_lost(x, model.config)],
        "of another size": [f"{x} {list(given)}, not {list(asked)}" for x, given, asked in sizes],
    }
    if any(wrong.values()):
        found = "; ".join(f"{kind}: {some(names)}" for kind, names in wrong.items() if names)
        raise UserError(f"weights and config of {source or 'the pruned model'} disagree: {found}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{source} has an adapter beside its weights (adapter_config.json): merge it "
            "(merge_and_unload) and pass what is written, or remove that file"
        )
    # transformers follows the files where they have a head of their own. Programs that follow a
    # config that ties it would lose it.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and head is not None:
        model.config.tie_word_embeddings = head.weight is embedding.weight
    return model  # type: ignore[no-any-return]


def _is_lost(name: str, config: PreTrainedConfig) -> bool:
    """Return whether a tensor that no module reads is of a decoder projection, or scales it."""
    ahead = getattr(config, "num_nextn_predict_layers", 0)
    numbers = (int(x) for x in name.split(".") if x.isdigit())
    if ahead and next(numbers, 0) >= config.num_hidden_layers:
        return False  # it predicts tokens further on, beside the decoder
    model_type = config.model_type
    family = brought_along(model_type) or FAMILIES.get(model_type.removeprefix(PREFIX))
    return family is not None and is_projection(name, family)


def is_projection(name: str, family: Family) -> bool:
    """Return whether a tensor in files is of a decoder projection, or scales it."""
    return name.startswith(f"{family.layers}.") and any(path in name for path in family.files)


@contextmanager
def one_line(source: str) -> Iterator[None]:
    """Turn what readers raise over missing, damaged or senseless files into one line.

    Raises:
        UserError: naming the source, in place of what they raise.
    """
    try:
        yield
    except UnpicklingError as error:  # torch's own words say how to run the code after all
        raise UserError(
            f"cannot load {source}: its weights are a pickle that is damaged, or asks for more "
            "than tensors, which is not done; pass a checkpoint with safetensors"
        ) from error
    except UNREADABLE as error:
        raise UserError(f"cannot load {source}: {textwrap.shorten(str(error), 300)}") from error


@contextmanager
def without_notes() -> Iterator[None]:
    """Silence transformers' long reports on what `_load` says in a line."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
