"""GGUF files, which llama.cpp and all that is built on it load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
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
    TokenType,
    quants,
)
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.errors import UserError
from nuteprune.export.gguf_arch import BLOCK, Arch
from nuteprune.export.gguf_ends import further_ends, name_for
from nuteprune.export.gguf_fit import Source, choose
from nuteprune.export.gguf_keys import context_length, write_dimensions
from nuteprune.export.gguf_rows import check_rows, mended, torn_rows
from nuteprune.export.gguf_tensors import tensors
from nuteprune.export.gguf_vocab import Vocabulary, check_vocabulary, read_vocabulary
from nuteprune.files import atomic, check_room, writing
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.packed import refuse_packed
from nuteprune.model.shape import Shape

Q = GGMLQuantizationType


@dataclass(frozen=True)
class FileType:
    """How weights are stored: the type of matrices, that of embedding and head, and the label."""

    matrices: GGMLQuantizationType
    ends: GGMLQuantizationType
    label: LlamaFileType
    quantized: bool = False


FILE_TYPES: dict[str, FileType] = {
    "f16": FileType(Q.F16, Q.F16, LlamaFileType.MOSTLY_F16),
    "bf16": FileType(Q.BF16, Q.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": FileType(Q.Q8_0, Q.Q8_0, LlamaFileType.MOSTLY_Q8_0, quantized=True),
    # Four bits cost the most in the embedding and the head: those get eight.
    "q4_0": FileType(Q.Q4_0, Q.Q8_0, LlamaFileType.MOSTLY_Q4_0, quantized=True),
    "f32": FileType(Q.F32, Q.F32, LlamaFileType.ALL_F32),
}
"""What `--type` takes. Vectors and norms are always float32, as llama.cpp wants them."""
_QUANTIZED = (Q.Q8_0, Q.Q4_0)
TO_QUANTIZE = ("f16", "bf16")
"""Those that llama.cpp's own quantizer is given: K-quants are made of them."""

_WHOLE = (".ffn_gate_inp.", ".shortconv.conv.", ".ssm_conv1d.", ".ssm_norm.", ".bias")
"""Routers, convolutions, norms and experts' biases, which stay in float32."""
_F16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Written:
    """What came of an export."""

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
) -> Written:
    """Write a model and its tokenizer as a GGUF file.

    The file appears when it is complete and its tokenizer has been compared with the original.

    Args:
        model: a model of a supported family, pruned or not.
        tokenizer: its tokenizer.
        path: the file; one that is there is replaced.
        type_name: one of `FILE_TYPES`.
        name: what the file calls the model.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text; None finds it.
        progress: told how many tensors of how many are written.

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
    source = Source(anatomy.family, anatomy.config, anatomy.shape, anatomy.biases)
    arch = choose(source)
    shape, notes = mended(source.shape, arch, kind.quantized)
    if kind.quantized:
        check_rows(shape, source.head_dim, type_name)
    vocabulary = read_vocabulary(tokenizer, len(anatomy.embedding.weight), pre_tokenizer)
    vocabulary.special.update(further_ends(vocabulary, model.generation_config))
    name, more = name_for(name or path.stem, vocabulary, tokenizer)
    notes += [*_notes(arch, source), *more]
    if type_name in TO_QUANTIZE:
        notes += torn_rows(shape, source.head_dim)
    infos = list(_tensor_infos(anatomy, arch, source, shape, type_name))
    with writing(path, "make room and do the same again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path, sum(info.bytes for info in infos))
        with atomic(path) as partial:
            writer = GGUFWriter(partial, arch.name)
            _write_general(writer, name, kind)
            write_dimensions(writer, anatomy, arch, source, shape)
            _write_vocabulary(writer, vocabulary)
            _write_tensors(writer, infos, tensors(anatomy, arch, source, shape), progress)
            compared = check_vocabulary(read_back(partial), tokenizer)
            size = partial.stat().st_size
    parameters = sum(prod(info.shape) for info in infos)
    return Written(arch.name, len(infos), parameters, size, compared, notes)


def _notes(arch: Arch, source: Source) -> Iterator[str]:
    """Yield what llama.cpp does otherwise than the model, though it can express it."""
    if source.window and arch.window_period is None:
        yield (
            f"the context length is {context_length(arch, source)}, the model's attention window: "
            "llama.cpp lets this architecture attend to everything"
        )
    if source.rope.get("rope_type") == "yarn" and not source.rope.get("truncate", True):
        yield (
            "llama.cpp rounds where YaRN's ramp begins and ends to whole features, and this model "
            "does not: its logits differ there, the more so the longer the text (docs/gguf.md)"
        )


@dataclass(frozen=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]
    stored: GGMLQuantizationType

    @property
    def bytes(self) -> int:
        return prod(quants.quant_shape_to_byte_shape(self.shape, self.stored))


def _tensor_infos(
    anatomy: Anatomy, arch: Arch, source: Source, shape: Shape, type_name: str
) -> Iterator[_TensorInfo]:
    """Yield what the file's index says of the tensors, which goes before all their values."""
    kind = FILE_TYPES[type_name]
    for name, values in tensors(anatomy, arch, source, shape):
        stored = Q.F32
        if values.ndim > 1 < values.shape[-1] and not any(x in name for x in _WHOLE):
            stored = kind.matrices if name.startswith("blk.") else kind.ends
        if stored in _QUANTIZED and values.shape[-1] % BLOCK:
            stored = Q.F16  # a row that no gate cuts; the others were checked
        largest = np.abs(values).max(initial=0)
        if not np.isfinite(largest):
            raise UserError(f"{name} has values that are not finite: the checkpoint is damaged")
        if stored == Q.F16 and largest > _F16_MAX:
            raise UserError(
                f"{name} has values beyond {_F16_MAX:.0f}, the largest of --type f16: pass bf16"
            )
        yield _TensorInfo(name, values.shape, stored)


def _write_tensors(
    writer: GGUFWriter,
    infos: list[_TensorInfo],
    values: Iterable[tuple[str, NDArray[np.float32]]],
    progress: Callable[[int, int], None],
) -> None:
    """Write the file: keys, the index of tensors, then one tensor after another."""
    for info in infos:
        dtype = np.dtype(np.float32)  # only declared; `raw_dtype` is what counts
        writer.add_tensor_info(info.name, info.shape, dtype, info.bytes, raw_dtype=info.stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for i, (info, (_, array)) in enumerate(zip(infos, values, strict=True)):
            writer.write_tensor_data(quants.quantize(array, info.stored))
            progress(i + 1, len(infos))
    finally:
        writer.close()


def _write_general(writer: GGUFWriter, name: str, kind: FileType) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(kind.label)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    for name, token in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def read_back(path: str | os.PathLike[str]) -> Vocabulary:
    """Return the tokenizer that a GGUF file describes."""
    values = metadata(path)
    prefix = "tokenizer.ggml."
    ids = {name: values.get(f"{prefix}{key}_token_id") for name, key in _SPECIAL_KEYS.items()}
    return Vocabulary(
        model=values[f"{prefix}model"],
        pre=values[f"{prefix}pre"],
        tokens=values[f"{prefix}tokens"],
        types=[TokenType(x) for x in values[f"{prefix}token_type"]],
        special={name: x for name, x in ids.items() if x is not None},
        adds_bos=values[f"{prefix}add_bos_token"],
        adds_eos=values[f"{prefix}add_eos_token"],
        merges=values.get(f"{prefix}merges"),
        scores=values.get(f"{prefix}scores"),
        adds_space=values[f"{prefix}add_space_prefix"],
        chat_template=values.get("tokenizer.chat_template"),
    )


_SPECIAL_KEYS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "eot": "eot",
    "eom": "eom",
}


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the keys and values of a GGUF file."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}
