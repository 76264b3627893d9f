"""Continuations of the same prompts by several models, to read side by side.

Shape suffixes: B prompts, N blocks of a source, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    made_BT = cast(Any, model).generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=min(new_tokens, positions - length),
        do_sample=False,
        pad_token_id=next(token for token in padding if token is not None),
    )
    texts = texts_of(tokenizer, made_BT[:, length:].tolist(), skip_special_tokens=True)
    return [text.rstrip() for text in texts]


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
