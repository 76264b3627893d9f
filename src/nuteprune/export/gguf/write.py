"""Writes GGUF files: keys, an index of tensors, then one tensor after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    quants,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.errors import UserError
from nuteprune.export.gguf.architectures import Architecture
from nuteprune.export.gguf.block_tensors import Array, Named
from nuteprune.export.gguf.metadata import context_length, model_keys
from nuteprune.export.gguf.refusals import ModelFacts, choose_architecture
from nuteprune.export.gguf.rows import BLOCK, check_rows, padded_shape, torn_rows
from nuteprune.export.gguf.tensors import all_tensors
from nuteprune.export.gguf.tokenizer import KEY, check_vocabulary, name_that_strips, read_vocabulary
from nuteprune.files import atomic, check_room, writing
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.weights import refuse_packed

Q = GGMLQuantizationType


FILE_TYPES = {x: GGMLQuantizationType[x.upper()] for x in ("f16", "bf16", "q8_0", "q4_0", "f32")}
"""What `--type` takes -> how matrices are stored. Vectors and norms are always float32, as
llama.cpp wants them."""
_QUANTIZED = (Q.Q8_0, Q.Q4_0)
TO_QUANTIZE = ("f16", "bf16")
"""File types that llama.cpp's own quantizer reads, to make K-quants of them."""

_IN_FLOAT32 = (".ffn_gate_inp.", ".shortconv.conv.", ".ssm_conv1d.", ".ssm_norm.", ".bias")
"""Routers, convolutions, norms and experts' biases, which stay in float32."""
_F16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class WrittenGguf:
    """The result of an export."""

    arch: str
    tensors: int
    parameters: int
    bytes: int
    texts_compared: int
    notes: list[str]


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike[str],
    *,
    type_name: str = "f16",
    name: str = "",
    pre_tokenizer: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WrittenGguf:
    """Write a model and its tokenizer as a GGUF file.

    The file appears when it is complete and its tokenizer has been compared with the original.

    Args:
        model: a model of a supported family, pruned or not.
        tokenizer: its tokenizer.
        path: the file; one that is there is replaced.
        type_name: one of `FILE_TYPES`.
        name: what the file calls the model.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text; None finds it.
        progress: called with the tensors written so far, and all that there are.

    Returns:
        What was written.

    Raises:
        UserError: if llama.cpp cannot express the model, or would compute something else; says
            which shape or property, and what would make it fit. Nothing is written then.
        RunFailed: if writing went wrong on the way, as where the disk is full.
    """
    refuse_packed(model)
    path, kind = Path(path), FILE_TYPES[type_name]
    anatomy = Anatomy(model)
    facts = ModelFacts(anatomy.family, anatomy.config, anatomy.shape, anatomy.biases)
    arch = choose_architecture(facts)
    is_quantized = kind in _QUANTIZED
    shape, notes = padded_shape(facts.shape, arch, is_quantized)
    if is_quantized:
        check_rows(shape, facts.head_dim, type_name)
    size, settings = len(anatomy.embedding.weight), model.generation_config
    vocabulary = read_vocabulary(tokenizer, size, pre_tokenizer, settings)
    name, strip_notes = name_that_strips(name or path.stem, vocabulary[KEY.LIST], tokenizer)
    notes += [*_differences(arch, facts), *strip_notes]
    if type_name in TO_QUANTIZE:
        notes += torn_rows(shape, facts.head_dim)
    label = LlamaFileType["ALL_F32" if type_name == "f32" else f"MOSTLY_{type_name.upper()}"]
    keys = {"general.type": "model", "general.name": name, "general.file_type": int(label)}
    keys["general.quantization_version"] = GGML_QUANT_VERSION
    of_model = model_keys(anatomy, arch, facts, shape)
    keys |= {f"{arch.name}.{key}": value for key, value in of_model.items()} | vocabulary
    writer = GGUFWriter(None, arch.name)
    for key, value in keys.items():
        _ADD[type(value)](writer, key, value)
    _add_infos(writer, all_tensors(anatomy, arch, facts, shape), type_name)
    infos = [*writer.tensors[0].values()]
    with writing(path, "make room and do the same again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path, sum(info.nbytes for info in infos))
        with atomic(path) as partial:
            _write(writer, partial, all_tensors(anatomy, arch, facts, shape), progress)
            compared = check_vocabulary(read_keys(partial), tokenizer)
            size = partial.stat().st_size
    parameters = sum(prod(info.shape) for info in infos)
    return WrittenGguf(arch.name, len(infos), parameters, size, compared, notes)


_ADD: dict[type, Callable[[GGUFWriter, str, Any], None]] = {
    bool: GGUFWriter.add_bool,
    int: GGUFWriter.add_uint32,
    float: GGUFWriter.add_float32,
    str: GGUFWriter.add_string,
    list: GGUFWriter.add_array,
}
"""How a file states what is of a type."""


def _differences(arch: Architecture, facts: ModelFacts) -> Iterator[str]:
    """Yield what llama.cpp does otherwise than the model, though it can express it."""
    if facts.window and arch.window_period is None:
        yield (
            f"the context length is {context_length(arch, facts)}, the model's attention window: "
            "llama.cpp lets this architecture attend to everything"
        )
    if facts.rope.get("rope_type") == "yarn" and not facts.rope.get("truncate", True):
        yield (
            "llama.cpp rounds where YaRN's ramp begins and ends to whole features, and this model "
            "does not: its logits differ there, the more so the longer the text (docs/gguf.md)"
        )


def _add_infos(writer: GGUFWriter, named: Named, type_name: str) -> None:
    """Add what the file's index says of tensors, which goes before all their values."""
    dtype = np.dtype(np.float32)  # only declared; `raw_dtype` is what counts
    for name, values in named:
        stored = _stored_type(name, values, type_name)
        size = prod(quants.quant_shape_to_byte_shape(values.shape, stored))
        writer.add_tensor_info(name, values.shape, dtype, size, raw_dtype=stored)


def _stored_type(name: str, values: Array, type_name: str) -> GGMLQuantizationType:
    """Return how a tensor is stored.

    Raises:
        UserError: if that cannot hold its values.
    """
    kind, stored = FILE_TYPES[type_name], Q.F32
    if values.ndim > 1 < values.shape[-1] and not any(x in name for x in _IN_FLOAT32):
        # Four bits cost the most in the embedding and the head: those get eight.
        stored = Q.Q8_0 if kind == Q.Q4_0 and not name.startswith("blk.") else kind
    if stored in _QUANTIZED and values.shape[-1] % BLOCK:
        stored = Q.F16  # a row that no gate cuts; the others were checked
    largest = np.abs(values).max(initial=0)
    if not np.isfinite(largest):
        raise UserError(f"{name} has values that are not finite: the checkpoint is damaged")
    if stored == Q.F16 and largest > _F16_MAX:
        raise UserError(
            f"{name} has values beyond {_F16_MAX:.0f}, the largest of --type f16: pass bf16"
        )
    return stored


def _write(
    writer: GGUFWriter, path: Path, named: Named, progress: Callable[[int, int], None]
) -> None:
    """Write the file: keys, the index of tensors, then one tensor after another."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    types = [info.dtype for info in writer.tensors[0].values()]
    try:
        for i, (stored, (_, array)) in enumerate(zip(types, named, strict=True)):
            writer.write_tensor_data(quants.quantize(array, stored))
            progress(i + 1, len(types))
    finally:
        writer.close()


def read_keys(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the keys and values of a GGUF file."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}
