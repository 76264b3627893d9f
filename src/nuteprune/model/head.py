"""Logits of a text's last tokens, without a copy of the language head for each sequence.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def last_logits(model: PreTrainedModel, ids_BT: Tensor, count: int) -> Tensor:
    """Return the logits (B, count, V) of the last tokens.

    The last tokens of several sequences do not lie beside each other. So torch multiplies them
    sequence by sequence, in half precision each with a copy of the whole head.

    Args:
        model: a causal LM.
        ids_BT: token ids.
        count: tokens of each sequence.
    """
    head: Any = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:])):
        output: Any = model(input_ids=ids_BT, use_cache=False, logits_to_keep=count)
    logits_BTV: Tensor = output.logits
    return logits_BTV
