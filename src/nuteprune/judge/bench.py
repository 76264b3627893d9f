"""How fast models decode, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.inference_mode()
def decode_rates(
    models: Mapping[str, PreTrainedModel],
    prompt_BT: Tensor,
    new_tokens: int = 32,
    repeats: int = 3,
) -> dict[str, float]:
    """Measure greedy decoding with a KV cache, models in turn, so that drift hits all alike.

    Args:
        models: name -> model.
        prompt_BT: token ids that decoding starts from.
        new_tokens: tokens decoded per repeat.
        repeats: counted repeats, after one to warm up.

    Returns:
        Name -> median of tokens per second, over the whole batch, prompt not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            elapsed = _decode(model, prompt_BT, new_tokens)
            if repeat:
                seconds[name].append(elapsed)
    tokens = new_tokens * prompt_BT.shape[0]
    return {name: tokens / statistics.median(times) for name, times in seconds.items()}


def _decode(model: PreTrainedModel, prompt_BT: Tensor, new_tokens: int) -> float:
    cache = None
    output = model(input_ids=prompt_BT.to(model.device), use_cache=True, logits_to_keep=1)
    key = "cache" if "cache" in output else "past_key_values"
    started = time.perf_counter()
    for _ in range(new_tokens):
        cache = output[key]
        next_B1 = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=next_B1, use_cache=True, logits_to_keep=1, **{key: cache})
    return time.perf_counter() - started
