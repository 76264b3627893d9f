"""A GGUF file in llama.cpp, to be judged: what it makes of blocks of text, and how it answers.

The C functions of the Python binding are called, since its own class asks for the logits of all
tokens of a prompt.

Shape suffixes: N blocks, T tokens of a block, V token ids.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nuteprune.errors import RunFailed, UserError

BINDING = "llama-cpp-py-sync>=0.11739"
_ERROR = 4  # ggml's level of what went wrong
_CELLS = 256  # llama.cpp rounds each sequence's cache up to it


def require_binding() -> None:
    """Refuse to run without llama.cpp's Python binding.

    Raises:
        UserError: saying what to install.
    """
    if find_spec("llama_cpp_py_sync") is None:
        raise UserError(f"llama.cpp's binding is not installed; run: pip install '{BINDING}'")


class GgufFile:
    """A loaded file, on the CPU, with as many threads as torch would take. Close it.

    Raises:
        RunFailed: if llama.cpp cannot load it, or later cannot run it; says what llama.cpp says.
    """

    def __init__(self, path: Path) -> None:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self._ffi, self._lib = get_ffi(), get_lib()
        self._errors: list[str] = []
        # Kept, since llama.cpp calls it as long as it lives.
        self._listener = self._ffi.callback("ggml_log_callback", self._listen)
        self._lib.llama_log_set(self._listener, self._ffi.NULL)
        self._lib.llama_backend_init()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._there(self._lib.llama_model_load_from_file(str(path).encode(), params))
        vocabulary = self._lib.llama_model_get_vocab(self._model)
        self._ids = int(self._lib.llama_vocab_n_tokens(vocabulary))

    def close(self) -> None:
        """Let go of the file, and of llama.cpp's log."""
        self._lib.llama_model_free(self._model)
        self._lib.llama_log_set(self._ffi.NULL, self._ffi.NULL)

    def nats(self, blocks_NT: Tensor) -> list[float]:
        """Return the mean negative log-likelihood of each block's tokens but the first."""
        count, length = blocks_NT.shape
        context, found = self._context(1, length), []
        for block in blocks_NT:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(context), True)
            tokens = [(int(x), i, 0, True) for i, x in enumerate(block)]
            logits_TV = self._eval(context, tokens)
            found.append(float(F.cross_entropy(logits_TV[:-1], block[1:].long())))
        self._lib.llama_free(context)
        assert len(found) == count
        return found

    def answers(
        self, prompts: Sequence[Sequence[int]], ends: Collection[int], most: int
    ) -> list[list[int]]:
        """Return greedy answers, as `judge.answers.write` does.

        Args:
            prompts: token ids of each.
            ends: tokens that end an answer; the answer has it too.
            most: tokens of an answer at most.
        """
        context = self._context(len(prompts), max(map(len, prompts)) + most)
        found: list[list[int]] = []
        for which, ids in enumerate(prompts):
            last = len(ids) - 1
            tokens = [(x, i, which, i == last) for i, x in enumerate(ids)]
            found.append([int(self._eval(context, tokens).argmax())])
        for _ in range(most - 1):
            open_ones = [i for i, x in enumerate(found) if x[-1] not in ends]
            if not open_ones:
                break
            places = [len(prompts[i]) + len(found[i]) - 1 for i in open_ones]
            tokens = [(found[i][-1], at, i, True) for i, at in zip(open_ones, places, strict=True)]
            best = self._eval(context, tokens).argmax(-1).tolist()
            for i, token in zip(open_ones, best, strict=True):
                found[i].append(token)
        self._lib.llama_free(context)
        return found

    def rates(self, prompt: int, answer: int) -> tuple[float, float]:
        """Return the tokens a second of a prompt, and of an answer to it; the second of two tries.

        Args:
            prompt: its tokens, read in one batch.
            answer: tokens after it, one at a time.
        """
        context, found = self._context(1, prompt + answer), (0.0, 0.0)
        for _ in range(2):
            self._lib.llama_memory_clear(self._lib.llama_get_memory(context), True)
            begun = time.perf_counter()
            self._eval(context, [(1, i, 0, i == prompt - 1) for i in range(prompt)])
            read = time.perf_counter()
            for i in range(answer):
                self._eval(context, [(1, prompt + i, 0, True)])
            found = (prompt / (read - begun), answer / (time.perf_counter() - read))
        self._lib.llama_free(context)
        return found

    def _context(self, sequences: int, length: int) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx = sequences * -(-length // _CELLS) * _CELLS
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = max(params.n_ubatch, length)
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        return self._there(self._lib.llama_init_from_model(self._model, params))

    def _eval(self, context: Any, tokens: Sequence[tuple[int, int, int, bool]]) -> Tensor:
        """Run tokens, and return logits (n, V) after those that ask for them, until the next call.

        Args:
            context: what holds the tokens before them.
            tokens: of each its id, its position, its sequence, and whether its logits are asked.
        """
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, is_asked) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, is_asked
        code = self._lib.llama_decode(context, batch)
        self._lib.llama_batch_free(batch)
        if code:
            raise RunFailed(f"llama.cpp ended with code {code}: {self._said()}")
        count = sum(x[-1] for x in tokens)
        values = self._ffi.buffer(self._lib.llama_get_logits(context), 4 * count * self._ids)
        return torch.from_numpy(np.frombuffer(values, np.float32)).view(count, self._ids)

    def _there(self, made: Any) -> Any:
        if made == self._ffi.NULL:
            raise RunFailed(f"llama.cpp cannot run it: {self._said()}")
        return made

    def _said(self) -> str:
        return self._errors[-1] if self._errors else "it does not say why"

    def _listen(self, level: int, text: Any, _: object) -> None:
        if level == _ERROR:
            self._errors.append(self._ffi.string(text).decode(errors="replace").strip())
