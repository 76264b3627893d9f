"""A stand-in for llama.cpp's Python binding: notes what is run; the next token is by rule."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader


class Library:
    """The C functions that are used; after token t comes t + 1."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.listener: Any = None
        self.files: list[SimpleNamespace] = []
        self.contexts: list[SimpleNamespace] = []
        self.passes: list[list[list[tuple[int, int, int]]]] = []
        """Of each pass, its batches: (token, position, sequence) of each token."""
        self.batch: Any = None
        self.code = 0

    def llama_log_set(self, listener: Any, _: None) -> None:
        self.listener = listener

    def llama_backend_init(self) -> None:
        pass

    def llama_model_default_params(self) -> SimpleNamespace:
        return SimpleNamespace()

    def llama_model_load_from_file(self, name: bytes, params: SimpleNamespace) -> Any:
        assert params.n_gpu_layers == 0
        path = Path(name.decode())
        if not path.is_file():
            self.listener(2, b"loading", None)
            self.listener(4, b"no such file\n", None)
            return None
        reader = GGUFReader(path)
        numbers = sum(prod(x.shape.tolist()) for x in reader.tensors)
        kinds = {x.tensor_type.name for x in reader.tensors if len(x.shape) > 1}
        file = SimpleNamespace(bytes=path.stat().st_size, numbers=numbers, kinds=kinds)
        self.files.append(file)
        return file

    def llama_model_get_vocab(self, model: Any) -> Any:
        return model

    def llama_vocab_n_tokens(self, _: Any) -> int:
        return self.tokens

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace(n_batch=8)

    def llama_init_from_model(self, model: Any, params: SimpleNamespace) -> SimpleNamespace:
        params.freed = False
        self.contexts.append(params)
        return params

    def llama_free(self, context: SimpleNamespace) -> None:
        context.freed = True

    def llama_get_memory(self, context: SimpleNamespace) -> SimpleNamespace:
        return context

    def llama_memory_clear(self, _: SimpleNamespace, data: bool) -> None:
        self.passes.append([])

    def llama_batch_init(self, size: int, *_: int) -> SimpleNamespace:
        fields = {x: [0] * size for x in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(**fields, seq_id=[[0] for _ in range(size)])

    def llama_batch_free(self, batch: SimpleNamespace) -> None:
        pass

    def llama_decode(self, context: SimpleNamespace, batch: SimpleNamespace) -> int:
        assert not context.freed
        assert batch.n_tokens <= context.n_batch
        assert set(batch.n_seq_id) == {1}
        sequences = [x for (x,) in batch.seq_id]
        self.passes[-1].append(list(zip(batch.token, batch.pos, sequences, strict=True)))
        self.batch = batch
        return self.code

    def llama_get_logits_ith(self, _: SimpleNamespace, index: int) -> bytes:
        assert self.batch.logits[index]
        row = np.zeros(self.tokens, np.float32)
        row[(self.batch.token[index] + 1) % self.tokens] = 1
        return row.tobytes()


def install(monkeypatch: pytest.MonkeyPatch, tokens: int) -> Library:
    """Let imports of the binding find the stand-in, which knows so many tokens."""
    library = Library(tokens)
    ffi = SimpleNamespace(
        NULL=None,
        callback=lambda _, function: function,
        string=lambda text: text,
        buffer=lambda values, size: values[:size],
    )
    binding, functions = ModuleType("llama_cpp_py_sync"), ModuleType("_cffi_bindings")
    binding.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    binding.__llama_cpp_tag__ = "b0"  # type: ignore[attr-defined]
    functions.get_ffi, functions.get_lib = lambda: ffi, lambda: library  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync", binding)
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync._cffi_bindings", functions)
    return library
