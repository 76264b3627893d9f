"""vLLM as the engine that writes: how texts begin and end is ours, the draws are its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch

from nuteprune.data.decoding import TextInProgress
from nuteprune.data.tokens import Openings
from nuteprune.errors import UserError
from nuteprune.processes import ALONE, Team


class VllmWriter:
    """Writes batches of texts as `decoding.write_batch` does, to bytes of its own.

    Args:
        model: hub id or folder.
        dtype: to compute in.
        tokens: of a text at most, with what comes before it.
        seed: of the engine.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        dtype: torch.dtype,
        tokens: int,
        *,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # A process that torch has started threads in must not be forked.
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        try:
            vllm: Any = import_module("vllm")
        except ImportError as error:
            raise UserError(
                "--engine vllm needs vLLM beside nuteprune: pip install vllm, or leave --engine out"
            ) from error
        self._vllm = vllm
        self._engine = vllm.LLM(
            model=model,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=tokens,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        self._vocabulary: int = self._engine.llm_engine.model_config.get_vocab_size()

    def __call__(
        self,
        opening: Openings,
        batch: Sequence[TextInProgress],
        most: int,
        generator: torch.Generator,
        team: Team = ALONE,
    ) -> Iterator[int]:
        """Write a batch; see `decoding.write_batch`. Yields after each call of the engine.

        A chat takes two calls: one for the question, one for the answer. The generator draws a seed
        for each call and text. The team is one process, as vLLM has processes of its own.
        """
        assert team.size == 1
        left = list(batch)
        while left:
            for text in left:
                while text.given and len(text.ids) < most:
                    text.next_token(-1)  # a given one
            left = [x for x in left if len(x.ids) < most]
            seeds = torch.randint(2**31, (len(left),), generator=generator).tolist()
            prompts = [{"prompt_token_ids": [*opening.start, *x.ids]} for x in left]
            params = [self._params(opening, *x, most) for x in zip(left, seeds, strict=True)]
            made = self._engine.generate(prompts, params, use_tqdm=False) if left else []
            for text, answer in zip(left, made, strict=True):
                for token in answer.outputs[0].token_ids:
                    text.next_token(token)
            left = [x for x in left if not x.ended and len(x.ids) < most]
            yield sum(len(x.ids) for x in batch)

    def _params(self, opening: Openings, text: TextInProgress, seed: int, most: int) -> Any:
        """Return how a text goes on: until it ends or, if it is a question, that ends."""
        padded = opening.known < self._vocabulary
        return self._vllm.SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=most - len(text.ids),
            ignore_eos=True,
            stop_token_ids=sorted(opening.asked if text.asks else opening.ends),
            detokenize=False,
            allowed_token_ids=list(range(opening.known)) if padded else None,
        )
