"""How a model decodes: what its cache is called, and attention of one token per text.

Under grouped-query attention the stock function reads the keys and values of a group once for each
query head on CPUs, in a kernel made for many tokens. For one token the heads of a group can take
the place of tokens: the same sums, a fifth of the time at 64 texts of 256 tokens.

Shape suffixes: B texts, H query heads, K KV heads, G query heads of a KV head, S tokens of queries,
T tokens of keys, D features of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_UNGROUPED = nn.Module()  # what is packed has as many query heads as KV heads


def cache_name(names: Collection[str]) -> str:
    """Return the name of the KV cache among names in a model's calls or outputs."""
    return "cache" if "cache" in names else "past_key_values"  # by version of transformers


@contextmanager
def heads_as_tokens() -> Iterator[None]:
    """Within this context, torch's attention decodes with the heads of a group as tokens.

    Nothing changes for passes of several tokens, for models without groups, or on accelerators,
    whose kernels know groups.
    """
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _attend(
    module: nn.Module,
    query_BHSD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention, (B, S, H, D), as `sdpa_attention_forward` does."""
    batch, heads, tokens, _ = query_BHSD.shape
    groups = key_BKTD.shape[1]
    shared = attention_mask is None or attention_mask.shape[1] == 1
    if tokens > 1 or heads == groups or not shared or query_BHSD.device.type != "cpu":
        return sdpa_attention_forward(
            module, query_BHSD, key_BKTD, value_BKTD, attention_mask, **kwargs
        )
    query_BKGD = query_BHSD.reshape(batch, groups, heads // groups, -1)
    packed = {**kwargs, "is_causal": False}
    made_BGKD, _ = sdpa_attention_forward(
        _UNGROUPED, query_BKGD, key_BKTD, value_BKTD, attention_mask, **packed
    )
    return made_BGKD.transpose(1, 2).reshape(batch, 1, heads, -1), None
