"""Continuations of the same prompts by several models, to read side by side.

Shape suffixes: B prompts, N blocks of a source, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data.tokens import texts_of

PROMPTS = 3
PROMPT_TOKENS = 32
NEW_TOKENS = 40


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts_BT: Tensor,
    new_tokens: int = NEW_TOKENS,
) -> list[str]:
    """Return how a model continues each prompt, greedily.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        prompts_BT: token ids, none of them padding.
        new_tokens: tokens at most; fewer where the model has no more positions.
    """
    length = prompts_BT.shape[1]
    positions = getattr(model.config, "max_position_embeddings", None) or length + new_tokens
    ids_BT = prompts_BT.to(model.device)
    padding = tokenizer.pad_token_id, tokenizer.eos_token_id, 0
    known = cast(Any, model).get_input_embeddings().weight.shape[0]
    with _plain(model):
        made_BT = cast(Any, model).generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=min(new_tokens, positions - length),
            do_sample=False,
            pad_token_id=next(x for x in padding if x is not None and x < known),
        )
    texts = texts_of(tokenizer, made_BT[:, length:].tolist(), skip_special_tokens=True)
    return [text.rstrip() for text in texts]


@contextmanager
def _plain(model: PreTrainedModel) -> Iterator[None]:
    """Let a model stop where it does by its own settings, and ignore what else they say."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


def side_by_side(
    tokenizer: PreTrainedTokenizerBase,
    prompts_BT: Tensor,
    dense: Sequence[str],
    pruned: Sequence[str],
) -> list[dict[str, str]]:
    """Return samples as the report reads them: rows of `prompt`, `dense` and `pruned`."""
    told = texts_of(tokenizer, prompts_BT.tolist(), skip_special_tokens=True)
    return [
        {"prompt": prompt, "dense": one, "pruned": other}
        for prompt, one, other in zip(told, dense, pruned, strict=True)
    ]


def prompts(held_out: Mapping[str, Tensor]) -> Tensor:
    """Return the beginnings of held-out blocks, of each source one.

    Args:
        held_out: source -> token ids (N, T), T the same for all.

    Returns:
        Token ids (B, T), at most half a block each, so that there is room to go on.
    """
    firsts_BT = torch.stack([blocks_NT[0] for blocks_NT in held_out.values()][:PROMPTS])
    return firsts_BT[:, : min(PROMPT_TOKENS, max(1, firsts_BT.shape[1] // 2))]
