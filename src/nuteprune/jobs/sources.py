"""Finds the model, tokenizer, device and dtype that a user names."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import Mxfp4Config

from nuteprune.data.specs import DEMO
from nuteprune.errors import UserError, in_one_line, panics_as_errors
from nuteprune.export.config import language_config
from nuteprune.export.hub import record_path
from nuteprune.export.loading import config_values, load_pruned
from nuteprune.export.record import inside, origin_of, read_record
from nuteprune.files import at_home, check_name
from nuteprune.jobs.job import DTYPES
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import PREFIX
from nuteprune.model.lookup import bring_along, family_named, wrapper_of
from nuteprune.run_folder import SELF

if TYPE_CHECKING:
    from nuteprune.export.wrapping import Around

ORIGIN = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
"""What the demo's model is; the package that carries it has no model card."""
STORED_DTYPE = "nuteprune_stored_dtype"
"""Attribute of a loaded model: the dtype of its files, which the result keeps."""
TOKENIZERS = ("*token*", "vocab*", "*.model")
"""What files of tokenizers are called."""
PATHS = (".", "/", "~")
"""How a path begins that cannot be a hub id."""


def locate(model: str) -> str:
    """Return the place of a model: the cached folder for `demo`, else the given one.

    Raises:
        UserError: if it looks like a path, and no folder is there.
    """
    if model == DEMO:
        from nuteprune.data.demo import model_folder  # few runs prune it

        return str(model_folder())
    check_name(model)
    looks_local = model.startswith(PATHS) or model.count("/") > 1
    if looks_local and not at_home(model).is_dir():
        raise UserError(f"model {model} is neither a folder nor a hub id; check the path")
    return str(at_home(model)) if at_home(model).is_dir() else model


def place(name: str) -> str:
    """Return an existing path as absolute; any other name unchanged."""
    path = at_home(name)
    return str(path.resolve()) if name not in (DEMO, SELF) and path.exists() else name


def origin(model: str) -> dict[str, Any]:
    """Return the record's entry on where a model comes from.

    A folder keeps its name, with ./ in front if the name could be a hub id. A
    checkpoint that is pruned already passes on its own origin, and adds itself to the history.
    """
    if model == DEMO:
        return dict(ORIGIN)
    is_folder = at_home(model).is_dir() and not model.startswith(PATHS)
    return origin_of(f"./{model}" if is_folder else model, record_of(model))


def record_of(model: str) -> dict[str, Any] | None:
    """Return the record of a pruned model, None for any other."""
    path = record_path(locate(model))
    return None if path is None else read_record(path.parent)


def read_config(model: str) -> dict[str, Any]:
    """Return a model's config, checked to be, or to have inside, a supported causal LM.

    Raises:
        UserError: if there is no such model, or it is not one that can be pruned.
    """
    where = locate(model)
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise UserError(
            f"{model} has no config.json: it is not a Hugging Face checkpoint{inside(Path(where))}"
        )
    try:
        values = config_values(where)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load model {model}: {_in_words(error, model)}") from error
    model_type = values["model_type"]
    if (wrapper := wrapper_of(model_type)) is not None:
        language_config(values)  # refuses what is not supported
        expected = wrapper.conditional
    else:
        expected = family_named(model_type, values).causal_lm
    named = values.get("architectures") or [expected]
    named = named if isinstance(named, list) else [named]
    if not any(str(name).removeprefix("Pruned") == expected for name in named):
        raise UserError(
            f"{model} is a {', '.join(map(str, named))}, not a causal language model; "
            f"supported: {', '.join(f.causal_lm for f in FAMILIES.values())}"
        )
    return values


def use_family(file: str | None, model: str) -> None:
    """Register a file's entry for a model's type in this process, after a check on a small model.

    Args:
        file: its path; None: the type is a listed one, and nothing is done.
        model: as the user named it.

    Raises:
        UserError: if the file is wrong, or its entry does not fit the model.
    """
    if file is None:
        return
    if at_home(model).is_dir() and record_of(model) is not None:
        raise UserError(f"the record of {model} has its entry; leave --family out")
    from nuteprune.jobs.family import checked, config_of  # few models need it
    from nuteprune.model.family_file import read_family

    bring_along(checked(config_of(model), read_family(at_home(file)))[0])


def around(model: str) -> Around | None:
    """Return what a model of several modalities has around its language model, None for others."""
    wrapper = wrapper_of(read_config(model)["model_type"])
    if wrapper is None:
        return None
    from nuteprune.export.wrapping import Around

    return Around(locate(model), wrapper)


def load_model(
    model: str,
    dtype: torch.dtype | None,
    bits: int | None = None,
    device: str = "cpu",
    exact: bool = False,
) -> PreTrainedModel:
    """Load a supported causal LM to compute in `dtype`, and note the dtype it is stored in.

    For a model of several modalities, load the language model inside.

    Args:
        model: as the user named it.
        dtype: the one to compute in; None: the stored one.
        bits: 8 or 4: bits per weight of the projections; None: in `dtype`.
        device: where weights in 8 or 4 bits go; others are loaded to the CPU.
        exact: take a wider dtype where `dtype` does not hold all values that are stored.

    Raises:
        UserError: if it cannot be loaded or is not supported.
    """
    values = read_config(model)
    stored = _stored_dtype(locate(model), values)
    dtype = dtype or stored
    packed = {} if bits is None else _packing(bits, dtype, device)
    if not packed and held_in_mxfp4(values):
        packed = {"quantization_config": Mxfp4Config(dequantize=True)}
    if exact:
        dtype = torch.promote_types(stored, dtype)
    loaded = load_pruned(locate(model), dtype=dtype, **packed)
    setattr(loaded, STORED_DTYPE, stored)
    return loaded


def held_in_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint holds its experts in MXFP4: they are unpacked to be cut."""
    held = config.get("quantization_config")
    return isinstance(held, Mapping) and held.get("quant_method") == "mxfp4"


def _stored_dtype(where: str, config: dict[str, Any]) -> torch.dtype:
    """Return the dtype that a checkpoint states, or, where it states none, that of its tensors."""
    stated = str(config.get("dtype") or config.get("torch_dtype") or "")
    found = getattr(torch, stated, None) if stated else load_pruned(where, dtype="auto").dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _packing(bits: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return the arguments for `from_pretrained`."""
    if find_spec("bitsandbytes") is None:
        raise UserError(f"weights in {bits} bits need bitsandbytes: pip install 'nuteprune[bits]'")
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype that the checkpoint was stored in, which the result keeps."""
    stored = getattr(model, STORED_DTYPE, None)
    return stored if isinstance(stored, torch.dtype) else model.dtype


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        model: as the user named it.
        trust_remote_code: whether Python files that come with the model may be run for it. Models
            themselves never need theirs: only stock classes can be pruned.

    Raises:
        UserError: if it has none that can be loaded.
    """
    # Named by its config alone, so that a pruned checkpoint's own config class is not asked for.
    model_type = read_config(model)["model_type"].removeprefix(PREFIX)
    config = PreTrainedConfig.from_dict({"model_type": model_type})
    try:
        with panics_as_errors():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                locate(model),
                config=config,
                # Never None, with which transformers asks on the terminal, in the middle of a job.
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UserError(
                f"the tokenizer of {model} is Python code that comes with it, and is not run "
                "unasked; read that code, and pass --trust-remote-code if you trust it"
            ) from error
        here = Path(locate(model))
        if here.is_dir() and not any(x for pattern in TOKENIZERS for x in here.glob(pattern)):
            raise UserError(
                f"{model} has no tokenizer; copy tokenizer.json and tokenizer_config.json there "
                "from the model that it was made of"
            ) from error
        said = _in_words(error, model)
        raise UserError(f"cannot load the tokenizer of {model}: {said}") from error
    try:
        with panics_as_errors():
            tokenizer.decode(tokenizer("a text").input_ids)
    except Exception as error:  # transformers looks at few settings before they are used
        raise UserError(
            f"the tokenizer of {model} reads no text ({in_one_line(error)}): mend its "
            "tokenizer_config.json, or copy its files anew from where they came"
        ) from error
    return tokenizer


def _in_words(error: Exception, model: str) -> str:
    """Return the hub's or the reader's message, and what to do about it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "gated repo" in str(error):
        return (
            "its owner asks for an agreement first; sign it on the model's page "
            f"(huggingface.co/{model}), then run hf auth login on this machine"
        )
    return f"{lines[0].rstrip('.')}; pass a hub id, a checkpoint folder, or 'demo'"


def pick_device(device: str) -> str:
    """Return the device for `auto`, or check the one that was named.

    Raises:
        UserError: if torch does not have it.
    """
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda" and index not in ("", "0"):
        raise UserError(
            f"device {device}: a run takes the first accelerator that it sees; pass --device cuda "
            f"and set CUDA_VISIBLE_DEVICES={index} before the command"
        )
    if kind == "cpu" or (kind == "cuda" and has_cuda):
        return kind
    raise UserError(
        f"device {device} is not here; this machine has cpu{' and cuda' if has_cuda else ''}"
    )


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the dtype to compute in; `auto` takes bfloat16 where the hardware is fast at it.

    Raises:
        UserError: if the name is unknown.
    """
    if dtype == "auto":
        fast = pick_device(device) != "cpu" or _cpu_multiplies_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; pass auto, {', '.join(DTYPES)}")
    return getattr(torch, dtype)  # type: ignore[no-any-return]


def _cpu_multiplies_bfloat16() -> bool:
    # Without these instructions bfloat16 products are emulated, several times slower than fp32.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("amx_tile"))
