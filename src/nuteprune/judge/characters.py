"""Bits per character: how well a model predicts text, whatever its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data.tokens import bos_of, end_of
from nuteprune.model.forwards import evaluating, last_logits


@torch.inference_mode()
def bits_per_character(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> float:
    """Return the negative log-likelihood of texts in bits, over their characters.

    Args:
        model: a causal LM; it computes where its parameters are, in evaluation mode.
        tokenizer: its tokenizer.
        texts: each is read by itself, after what the tokenizer begins texts with, or after
            end-of-text; at least one is not empty.
    """
    start, nats = bos_of(tokenizer) or end_of(tokenizer), 0.0
    with evaluating(model):
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            ids_1T = torch.tensor([[*start, *ids]], device=model.device)
            logits_TV = last_logits(model, ids_1T, len(ids) + 1)[0, :-1].float()
            nats += float(F.cross_entropy(logits_TV, ids_1T[0, len(start) :], reduction="sum"))
    return nats / math.log(2) / sum(map(len, texts))
