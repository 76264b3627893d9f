"""llama.cpp as an engine: a GGUF file, timed through the C functions that a Python binding gives.

The binding's own class is not used: it asks for the logits of all tokens of a prompt.

Shape suffixes: B sequences of a batch, T tokens of each.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nuteprune.errors import RunFailed, UserError
from nuteprune.judge.bench import Timing
from nuteprune.judge.work import Work, Workload
from nuteprune.judge.worker import About

BINDING = "llama_cpp_py_sync"
CACHES = {4: 0, 2: 1}
"""Bytes of a parameter -> ggml's type of a KV cache that is as wide."""
_CELLS = 256  # llama.cpp rounds each sequence's cache up to it
_ERROR = 4  # ggml's level of what went wrong


def require_binding() -> None:
    """Refuse to run without the extra `llama-cpp`.

    Raises:
        UserError: saying what to install.
    """
    if find_spec(BINDING) is None:
        raise UserError(
            f"the engine llama.cpp needs {BINDING}, not installed here; "
            "run: pip install 'nuteprune[llama-cpp]'"
        )


class LlamaCppRunner:
    """A GGUF file in llama.cpp, on the CPU.

    Args:
        file: the GGUF file.
        work: what the model has to move and multiply, as it is stored there.
        positions: tokens of a sequence that it can take; None: any.
        threads: None: as many as torch would take.

    Raises:
        RunFailed: if llama.cpp cannot load it; says what llama.cpp says.
    """

    def __init__(
        self, file: str, work: Work, positions: int | None, threads: int | None = None
    ) -> None:
        from llama_cpp_py_sync import __llama_cpp_tag__
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self._ffi, self._lib = get_ffi(), get_lib()
        self._errors: list[str] = []
        # Kept, since llama.cpp calls it as long as it lives.
        self._listener = self._ffi.callback("ggml_log_callback", self._listen)
        self._lib.llama_log_set(self._listener, self._ffi.NULL)
        self._lib.llama_backend_init()
        engine, threads = f"llama.cpp {__llama_cpp_tag__}", threads or torch.get_num_threads()
        self.about = About(work, positions, engine, "its own", threads, "CPU")
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._there(self._lib.llama_model_load_from_file(file.encode(), params))
        vocabulary = self._lib.llama_model_get_vocab(self._model)
        self._tokens = int(self._lib.llama_vocab_n_tokens(vocabulary))
        self._context: Any = None
        self._fits: Workload | None = None

    def time(self, setting: Workload) -> Timing:
        """Time one pass of random tokens, decoded greedily."""
        self._make_room(setting)
        size = (setting.batch_size, setting.length)
        prompt_BT = np.random.default_rng(0).integers(self._tokens, size=size)
        started = time.perf_counter()
        next_B1 = self._eval(prompt_BT, 0)
        known = time.perf_counter()
        for step in range(setting.new_tokens):
            next_B1 = self._eval(next_B1, setting.length + step)
        return Timing(known - started, time.perf_counter() - known)

    def _make_room(self, setting: Workload) -> None:
        """Have an empty context for a setting: the one from before, or a new one."""
        if setting != self._fits:
            if self._context is not None:
                self._lib.llama_free(self._context)
            params = self._lib.llama_context_default_params()
            held = setting.length + setting.new_tokens
            params.n_ctx = setting.batch_size * -(-held // _CELLS) * _CELLS
            params.n_seq_max = setting.batch_size
            params.n_batch = max(params.n_batch, setting.batch_size * setting.length)
            params.n_threads = params.n_threads_batch = self.about.threads
            params.type_k = params.type_v = CACHES[self.about.work.bytes_per_parameter]
            self._context = self._there(self._lib.llama_init_from_model(self._model, params))
            self._fits = setting
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _eval(self, tokens_BT: NDArray[np.int64], past: int) -> NDArray[np.int64]:
        """Run tokens after those that the cache holds; returns each sequence's best next (B, 1)."""
        batch = self._lib.llama_batch_init(tokens_BT.size, 0, 1)
        batch.n_tokens = tokens_BT.size
        length = tokens_BT.shape[1]
        for i, token in enumerate(tokens_BT.flat):
            batch.token[i] = int(token)
            batch.pos[i] = past + i % length
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // length
            batch.logits[i] = i % length == length - 1
        code = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if code:
            raise RunFailed(f"llama.cpp ended with code {code}: {self._said()}")
        lasts = range(length - 1, tokens_BT.size, length)
        return np.array([[self._best(i)] for i in lasts])

    def _best(self, index: int) -> int:
        """Return the likeliest token after one of the batch's."""
        values = self._lib.llama_get_logits_ith(self._context, index)
        row = self._ffi.buffer(values, 4 * self._tokens)
        return int(np.frombuffer(row, np.float32).argmax())

    def _there(self, made: Any) -> Any:
        if made == self._ffi.NULL:
            raise RunFailed(f"llama.cpp cannot run it: {self._said()}")
        return made

    def _said(self) -> str:
        return self._errors[-1] if self._errors else "it does not say why"

    def _listen(self, level: int, text: Any, _: object) -> None:
        if level == _ERROR:
            self._errors.append(self._ffi.string(text).decode(errors="replace").strip())
