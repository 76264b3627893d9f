"""What llama.cpp knows by texts and names alone: at which tokens it stops, and what it strips."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from nuteprune.export.gguf_vocab import Vocabulary

ENDS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>"),
        "<end_of_utterance>",
    }
)
"""Tokens by whose text llama.cpp knows that they end a generation; in `llama-vocab.cpp`."""
STRIPS = ("phi-3", "phi3")
"""Of models with one of these in their name llama.cpp drops white space after special tokens."""
_STRIPPED_BY_NAME = ("</s>", "<unk>", "<s>", "<|endoftext|>")
"""Tokens that it then looks up, and does not load the file without."""


def further_ends(vocabulary: Vocabulary, settings: Any) -> dict[str, int]:
    """Return `eot` and `eom`: tokens at which a model stops, and llama.cpp would not, two at most.

    Args:
        vocabulary: the tokenizer's keys.
        settings: of the model's generation.
    """
    given = getattr(settings, "eos_token_id", None)
    ids = given if isinstance(given, list) else [given]
    tokens = vocabulary.tokens
    more = [
        i
        for i in ids
        if i is not None and i != vocabulary.special.get("eos") and tokens[i : i + 1]
        if tokens[i] not in ENDS
    ]
    return dict(zip(("eot", "eom"), more, strict=False))


def name_for(
    name: str, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[str]]:
    """Return a name by which llama.cpp strips what the tokenizer strips, and notes on the rest.

    GGUF has no key for it.

    Args:
        name: what the model is to be called.
        vocabulary: the tokenizer's keys.
        tokenizer: the checkpoint's.
    """
    added = tokenizer.added_tokens_decoder.values()
    strips = sorted(x.content for x in added if x.special and x.rstrip)
    known = set(_STRIPPED_BY_NAME) <= set(vocabulary.tokens)
    named = any(x in name.lower() for x in STRIPS)
    if strips and known:
        return name if named else f"{name} (phi-3)", []
    if named:
        name = re.sub("(?i)phi-?3", "phi_3", name)
    if strips:
        return name, [f"llama.cpp keeps white space after {strips[0]}, which the tokenizer drops"]
    return name, []
